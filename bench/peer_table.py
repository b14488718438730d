"""The cases that are compared with each other: loaders, and training loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tidali.errors import UsageError
from tidali.hardware.device import DevicePlan
from tidali.hardware.versions import dali_package


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A case."""

    id: str
    """Its name on the command line."""
    name: str
    """Its name in the table."""
    target: str
    """See `bench.case_worker.Job`."""
    package: str
    """The distribution whose version is recorded."""
    env: str | None = None
    """A key of `bench.peer_env.ENVIRONMENTS`; None: tidali's own Python has the package."""
    carried_over: int = 0
    """How many samples of the next epoch an epoch may contain: the size of a shuffle buffer that is not emptied in between."""
    hint: str = ""
    """What to do if it does not start."""
    base: str = "torchvision-v1"
    """Id of the case that this one's rate is divided by."""
    decodes: bool = True
    """For a loader: it decodes JPEGs for every batch."""
    kernel: str = "bicubic"
    """For a loader: what it resizes crops with. All of them are antialiased."""
    only_crops: bool = False
    """For a loader: without random resized crops it would do the work of the case above it."""
    no_crops: str = ""
    """For a loader: why it has no random resized crops."""
    own_files: str = ""
    """For a loader that reads a format of its own: a glob pattern of its files in the scratch folder."""
    pixel_dtype: torch.dtype = torch.float32
    """For a loader: dtype of its batches."""
    product_dtype: Callable[[DevicePlan], torch.dtype | None] = lambda plan: None
    """For a training loop: the dtype of its matrix products on that device, None for float32."""


def _loader(id: str, name: str, package: str, **fields: Any) -> Peer:
    return Peer(id=id, name=name, package=package, target=f"bench.peer_loaders:{id.replace('-', '_')}", **fields)


def _training(loop: str, name: str, package: str, **fields: Any) -> list[Peer]:
    return [
        Peer(
            id=f"{loop}-{part}",
            name=f"{name}, {words}",
            package=package,
            target=f"bench.training_loops:{loop}_{part}",
            base=f"torchvision-{part}",
            **fields,
        )
        for part, words in (("step", "step"), ("loop", "end to end"))
    ]


_CACHE_NO_CROPS = "its cache keeps images of unequal size as squares, of which random crops would be blurred"
LOADERS = (
    _loader("torchvision-v1", "torchvision v1", "torchvision"),
    _loader("torchvision-v2", "torchvision v2", "torchvision"),
    _loader("webdataset", "webdataset", "webdataset"),
    _loader("dali-file", "DALI file reader", dali_package()),
    _loader("dali-webdataset", "DALI webdataset reader", dali_package(), carried_over=1024),  # its buffer's default size
    _loader("ffcv-raw", "FFCV raw", "ffcv", env="ffcv", decodes=False, kernel="area (OpenCV)", own_files="raw.beton"),
    _loader("ffcv-jpg", "FFCV jpg", "ffcv", env="ffcv", kernel="area (OpenCV)", own_files="jpg.beton"),
    _loader(
        "ffcv-jpg-400",
        "FFCV jpg, shrunk to 400 px",
        "ffcv",
        env="ffcv",
        kernel="area (OpenCV)",
        own_files="jpg.beton",
        only_crops=True,
    ),
    _loader("litdata", "LitData", "litdata", env="litdata", own_files="chunks/*"),
    _loader("mosaic", "MosaicML Streaming", "mosaicml-streaming", env="mosaic", own_files="mds/*"),
    _loader("spdl", "SPDL", "spdl", env="spdl", hint="it needs FFmpeg's libraries, 4 or later: apt-get install ffmpeg"),
    _loader("tidali-streaming", "tidali streaming", "tidali"),
    _loader("tidali-cached", "tidali cached", "tidali", decodes=False, no_crops=_CACHE_NO_CROPS),
    _loader(
        "tidali-cached-bf16",
        "tidali cached, bf16",
        "tidali",
        decodes=False,
        no_crops=_CACHE_NO_CROPS,
        pixel_dtype=torch.bfloat16,
    ),
)
TRAINING = (
    *_training("study", "original study", "torch"),
    *_training(
        "torchvision",
        "torchvision reference",
        "torchvision",
        product_dtype=lambda plan: torch.float16 if plan.device.type == "cuda" else None,
    ),
    *_training("timm", "timm", "timm", env="timm", product_dtype=lambda plan: plan.amp_dtype),
    *_training("tidali", "tidali", "tidali", product_dtype=lambda plan: plan.amp_dtype),
)
REFERENCE = _loader("reference", "the reference", "torchvision")
"""What the loaders are checked against."""


def chosen(table: Sequence[Peer], names: Sequence[str] | None) -> tuple[Peer, ...]:
    """The peers with these ids, or of these families: ``ffcv`` is all that begin with ffcv-. None: all. In the table's order.

    Raises:
        UsageError: a name is neither.
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
