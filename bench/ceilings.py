"""Ceilings: what this machine reaches at most (JPEG decoding, memory copy, matrix product, copies to and within the GPU).

They are measured as cases among the others, so that a slow spell of the machine affects a ceiling as much as what is compared
with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from bench.measure import Case, Rates
from tidali.dataset.contract import Dataset, SampleRecord, iter_records
from tidali.hardware.device import DevicePlan, choose_amp, describe_device
from tidali.hardware.limits import cpu_count

DECODE, COPY, UPLOAD, GPU_COPY = "JPEG decoding", "memory copy", "host-to-GPU copy", "GPU memory copy"
_COPY_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""More than a last-level cache holds, by where it is copied to, so that memory is what is measured."""
_PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}
_DECODE_IMAGES = 512

UNITS = {DECODE: "images", COPY: "bytes", UPLOAD: "bytes", GPU_COPY: "bytes"}
"""What a ceiling counts per second. Matrix products count floating-point operations, a multiply-add as two."""


def matrix_product(dtype: torch.dtype | None) -> str:
    """The name of the ceiling of matrix products in a dtype; None is float32."""
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32", torch.float32: "float32"}[dtype]
    return f"{short} matrix-product"


def ceiling_cases(plan: DevicePlan, *, jpegs: Sequence[bytes] = ()) -> dict[str, Case]:
    """The ceilings of this machine, by name.

    Args:
        jpegs: images to decode. Empty: decoding is not measured, as for data in another format.
    """
    device, host = plan.device, torch.device("cpu")
    cases = {DECODE: Case(step=_decode(jpegs))} if jpegs else {}
    cases[COPY] = Case(step=_copy(host, host))
    if device.type == "cuda":
        cases[UPLOAD] = Case(step=_copy(host, device), device=device)
        cases[GPU_COPY] = Case(step=_copy(device, device), device=device)
    for dtype in _product_dtypes(plan):
        cases[matrix_product(dtype)] = Case(step=_multiply(device, dtype), device=device)
    return cases


def _product_dtypes(plan: DevicePlan) -> list[torch.dtype]:
    """float32, the dtype that the plan trains in, and those that the device multiplies fast; none that it has to emulate."""
    on_gpu = plan.device.type == "cuda"
    fast, _ = choose_amp(describe_device("cuda" if on_gpu else "cpu"), "auto")
    dtypes = [torch.float32, fast, plan.amp_dtype, torch.float16 if on_gpu and fast is not None else None]
    return list(dict.fromkeys(dtype for dtype in dtypes if dtype is not None))


def sample_jpegs(dataset: Dataset, *, most: int = _DECODE_IMAGES) -> list[bytes]:
    """The stored bytes of the train split's first images, without those that are no JPEGs."""
    jpegs = (content for record, content in stored_images(dataset) if record.extension == "jpg")
    return list(itertools.islice(jpegs, most))


def stored_images(dataset: Dataset) -> Iterator[tuple[SampleRecord, bytes]]:
    """The train split's records and stored bytes, in the order of the shards."""
    for shard, record in iter_records(dataset, "train"):
        with (dataset.root / shard.name).open("rb") as tar:
            tar.seek(record.offset)
            yield record, tar.read(record.size_bytes)


def _decode(jpegs: Sequence[bytes]) -> Callable[[], float]:
    """libjpeg-turbo with one thread per core, to RGB, one image after the other from memory."""
    import simplejpeg

    threads = cpu_count()
    pool = ThreadPoolExecutor(threads)
    batch = [jpegs[number % len(jpegs)] for number in range(_DECODE_IMAGES)]
    parts = [batch[first::threads] for first in range(threads)]

    def decode(part: Sequence[bytes]) -> None:
        for data in part:
            simplejpeg.decode_jpeg(data, colorspace="RGB")

    def step() -> float:
        list(pool.map(decode, parts))
        return len(batch)

    return step


def _copy(source: torch.device, target: torch.device) -> Callable[[], float]:
    """Copied bytes, each counted once although it is read and written."""
    uploads = source.type == "cpu" and target.type == "cuda"
    size_bytes = _COPY_BYTES[target.type]
    there = torch.ones(size_bytes, dtype=torch.uint8, device=source, pin_memory=uploads)
    here = torch.zeros(size_bytes, dtype=torch.uint8, device=target)

    def step() -> float:
        here.copy_(there, non_blocking=True)
        return size_bytes

    return step


def _multiply(device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    side = _PRODUCT_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)

    def step() -> float:
        torch.mm(a, b, out=out)
        return 2.0 * side**3

    return step


# ------------------------------------------------------------------------------------------------- rates compared with ceilings


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The highest rate that one resource of this machine allows a case."""

    name: str
    images_per_s: float

    def share(self, rates: Rates) -> float:
        """The case's rate as a fraction of it. Can be slightly above 1: a ceiling is a measurement too."""
        return rates.median / self.images_per_s

    def fields(self, rates: Rates) -> dict[str, Any]:
        """For a row of the document."""
        return {"ceiling": {"name": self.name, "images_per_s": self.images_per_s, "share": self.share(rates)}}


def lowest_ceiling(measured: Mapping[Any, Rates], cost: Mapping[str, float]) -> Ceiling | None:
    """The ceiling that limits a case most; None if none was measured.

    Args:
        measured: rates by name, those of the ceilings among them.
        cost: what one image of the case uses, by the name of the ceiling: 1 for decoding, bytes for copies, floating-point
            operations for products. A ceiling that was not measured is ignored.
    """
    allowed = {name: measured[name].median / amount for name, amount in cost.items() if name in measured and amount}
    if not allowed:
        return None
    name = min(allowed, key=lambda name: allowed[name])
    return Ceiling(name=name, images_per_s=allowed[name])


def ceiling_rows(measured: Mapping[Any, Rates], **where: Any) -> list[dict[str, Any]]:
    """The ceilings among the rates, for a document."""
    return [
        {**where, "ceiling": name, "unit": UNITS.get(name, "flop"), "per_s": rates.to_dict()}
        for name, rates in measured.items()
        if name in UNITS or name.endswith("matrix-product")
    ]
