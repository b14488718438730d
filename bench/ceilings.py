"""What the machine itself can do: decode JPEGs, copy memory, multiply matrices, copy to the GPU.

Each is a case like the others, so that a slow spell of the machine falls on the ceiling as on what stands under it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from bench.measure import Case, Rates
from tidali.dataset.contract import Dataset, iter_records
from tidali.hardware.device import DevicePlan, choose_amp, cpu_count, describe_device

DECODE, COPY, UPLOAD = "JPEG decoding", "memory copy", "host-to-GPU copy"
_COPY_BYTES = 64 << 20
"""More than a last-level cache holds, so that it is memory that is measured."""
_PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}
_DECODE_STEP = 512

UNITS = {DECODE: "images", COPY: "bytes", UPLOAD: "bytes"}
"""What a ceiling counts each second; matrix products count floating-point operations, a multiply-add as two."""


def products(dtype: torch.dtype | None) -> str:
    """The name of the ceiling of matrix products in a dtype; None is float32."""
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32", torch.float32: "float32"}[dtype]
    return f"{short} matrix-product"


def ceiling_cases(plan: DevicePlan, *, jpegs: Sequence[bytes] = ()) -> list[Case]:
    """The ceilings of this machine.

    Args:
        jpegs: images to decode; none: decoding is left out, as for data that is stored otherwise.
    """
    device = plan.device
    cases = [Case(name=COPY, step=_copy(torch.device("cpu"), torch.device("cpu")))]
    if jpegs:
        cases.insert(0, Case(name=DECODE, step=_decode(jpegs)))
    if device.type == "cuda":
        cases.append(Case(name=UPLOAD, step=_copy(torch.device("cpu"), device), device=device))
    cases += [Case(name=products(dtype), step=_multiply(device, dtype), device=device) for dtype in sensible_dtypes(plan)]
    return cases


def sensible_dtypes(plan: DevicePlan) -> list[torch.dtype]:
    """float32, what the plan trains in, and what the device multiplies fast; not what it would have to emulate."""
    fast, _ = choose_amp(describe_device("cuda" if plan.device.type == "cuda" else "cpu"), "auto")
    dtypes = [torch.float32, *(dtype for dtype in (fast, plan.amp_dtype) if dtype is not None)]
    if plan.device.type == "cuda" and fast is not None:
        dtypes.append(torch.float16)
    return list(dict.fromkeys(dtypes))


def sample_jpegs(dataset: Dataset, *, most: int = _DECODE_STEP) -> list[bytes]:
    """The stored bytes of the train split's first images; none where they are no JPEGs."""
    found: list[bytes] = []
    for shard, record in iter_records(dataset, "train"):
        if record.extension == "jpg":
            with (dataset.root / shard.name).open("rb") as tar:
                tar.seek(record.offset)
                found.append(tar.read(record.size_bytes))
        if len(found) == most:
            break
    return found


def _decode(jpegs: Sequence[bytes]) -> Callable[[], float]:
    """libjpeg-turbo on a thread a core, to RGB, one image after the other from memory."""
    import simplejpeg

    threads = cpu_count()
    pool = ThreadPoolExecutor(threads)
    batch = [jpegs[number % len(jpegs)] for number in range(_DECODE_STEP)]
    parts = [batch[first::threads] for first in range(threads)]

    def decode(part: Sequence[bytes]) -> None:
        for data in part:
            simplejpeg.decode_jpeg(data, colorspace="RGB")

    def step() -> float:
        list(pool.map(decode, parts))
        return len(batch)

    return step


def _copy(source: torch.device, target: torch.device) -> Callable[[], float]:
    """Bytes copied, each counted once though it is read and written."""
    pinned = target.type == "cuda"
    there = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=source, pin_memory=pinned)
    here = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=target)

    def step() -> float:
        here.copy_(there, non_blocking=True)
        return _COPY_BYTES

    return step


def _multiply(device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    side = _PRODUCT_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)

    def step() -> float:
        torch.mm(a, b, out=out)
        return 2.0 * side**3

    return step


# --------------------------------------------------------------------------------------------------------------------- shares


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The ceiling that a case stands under."""

    ceiling: str
    images_per_s: float
    """What the ceiling allows."""

    def share(self, rates: Rates) -> float:
        """The case's rate as a part of it. A little above 1 is possible: a ceiling is a measurement too."""
        return rates.median / self.images_per_s

    def fields(self, rates: Rates) -> dict[str, Any]:
        """For a row of the document."""
        return {"ceiling": {"name": self.ceiling, "images_per_s": self.images_per_s, "share": self.share(rates)}}


def binding(measured: Mapping[str, Rates], cost: Mapping[str, float]) -> Bound | None:
    """The lowest of the ceilings.

    Args:
        measured: rates by name, the ceilings among them.
        cost: ceiling -> what an image takes of it: 1 of decoding, bytes of copying, operations of products. A ceiling that was
            not measured binds nothing.
    """
    allowed = {name: measured[name].median / amount for name, amount in cost.items() if name in measured and amount}
    if not allowed:
        return None
    name = min(allowed, key=lambda name: allowed[name])
    return Bound(ceiling=name, images_per_s=allowed[name])


def ceiling_rows(measured: Mapping[str, Rates], **where: Any) -> list[dict[str, Any]]:
    """The ceilings among the rates, for a document."""
    return [
        {**where, "ceiling": name, "unit": UNITS.get(name, "flop"), "per_s": rates.to_dict()}
        for name, rates in measured.items()
        if name in UNITS or name.endswith("matrix-product")
    ]
