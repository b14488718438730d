"""The cases that are measured beside each other: loaders, and training loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tidali.errors import UsageError
from tidali.hardware.device import DevicePlan


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A case."""

    id: str
    """On the command line."""
    name: str
    """In the table."""
    target: str
    package: str
    """The distribution whose version is recorded."""
    env: str | None = None
    """Of `bench.peer_env.ENVIRONMENTS`; None: tidali's own Python has it."""
    loose: int = 0
    """Samples that an epoch may take from the next one: a shuffle buffer that is not emptied in between."""
    hint: str = ""
    """The way out where it does not start."""
    base: str | None = None
    """Id of the case that this one's rate is given as a multiple of; None: torchvision's of the table."""
    decodes: bool = True
    """A loader: it decodes JPEGs for every batch."""
    pixel_dtype: torch.dtype = torch.float32
    """A loader: of its batches."""
    multiplies_in: Callable[[DevicePlan], torch.dtype | None] = lambda plan: None
    """A training loop: the dtype of its products on that device, None for float32."""


def _loader(id: str, name: str, package: str, **more: Any) -> Peer:
    return Peer(id=id, name=name, package=package, target=f"bench.peer_loaders:{id.replace('-', '_')}", **more)


def _training(loop: str, name: str, package: str, **more: Any) -> list[Peer]:
    return [
        Peer(
            id=f"{loop}-{part}",
            name=f"{name}, {words}",
            package=package,
            target=f"bench.peer_training:{loop}_{part}",
            base=f"torchvision-{part}",
            **more,
        )
        for part, words in (("step", "step"), ("loop", "end to end"))
    ]


def _fp16_on_a_gpu(plan: DevicePlan) -> torch.dtype | None:
    return torch.float16 if plan.device.type == "cuda" else None


def _as_tidali(plan: DevicePlan) -> torch.dtype | None:
    return plan.amp_dtype


LOADERS = (
    _loader("torchvision-v1", "torchvision v1", "torchvision"),
    _loader("torchvision-v2", "torchvision v2", "torchvision"),
    _loader("webdataset", "webdataset", "webdataset"),
    _loader("dali-file", "DALI file reader", "nvidia-dali-cuda120"),
    _loader("dali-webdataset", "DALI webdataset reader", "nvidia-dali-cuda120", loose=1024),  # its buffer's default
    _loader("ffcv-raw", "FFCV raw", "ffcv", env="ffcv", decodes=False),
    _loader("ffcv-jpg", "FFCV jpg", "ffcv", env="ffcv"),
    _loader("litdata", "LitData", "litdata", env="litdata"),
    _loader("mosaic", "MosaicML Streaming", "mosaicml-streaming", env="mosaic"),
    _loader("spdl", "SPDL", "spdl", env="spdl", hint="it needs FFmpeg's libraries, 4 or later: apt-get install ffmpeg"),
    _loader("tidali-streaming", "tidali streaming", "tidali"),
    _loader("tidali-cached", "tidali cached", "tidali", decodes=False),
    _loader("tidali-cached-bf16", "tidali cached, bf16", "tidali", decodes=False, pixel_dtype=torch.bfloat16),
)
TRAINING = (
    *_training("study", "original study", "torch"),
    *_training("torchvision", "torchvision reference", "torchvision", multiplies_in=_fp16_on_a_gpu),
    *_training("timm", "timm", "timm", env="timm", multiplies_in=_as_tidali),
    *_training("tidali", "tidali", "tidali", multiplies_in=_as_tidali),
)
REFERENCE = _loader("reference", "the reference", "torchvision")
"""What the loaders are checked by."""


def chosen(table: Sequence[Peer], names: Sequence[str] | None) -> tuple[Peer, ...]:
    """The peers of these ids, or of these families: ``ffcv`` is ffcv-raw and ffcv-jpg. None: all. In the table's order.

    Raises:
        UsageError: a name that is neither.
    """
    if names is None:
        return tuple(table)
    wanted = set()
    for name in names:
        found = {peer.id for peer in table if peer.id == name or peer.id.startswith(f"{name}-")}
        if not found:
            raise UsageError(f"--peers {name}: choose from {', '.join(peer.id for peer in table)}")
        wanted |= found
    return tuple(peer for peer in table if peer.id in wanted)
