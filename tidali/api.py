"""Functions for other programs, with the command line's defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed
from torch import nn

from tidali.config import Augment, CacheChoice, Kernel, Preprocess, TrainSettings, check_res
from tidali.dataset.contract import Dataset
from tidali.dataset.source import open_data
from tidali.errors import UsageError
from tidali.hardware.device import plan_device
from tidali.hardware.ranks import Ranks
from tidali.loading.batches import Batches, Training
from tidali.loading.data import Data
from tidali.training.run import train
from tidali.training.run_folder import RunResult


def make_loader(
    data: Dataset | str,
    split: str,
    *,
    res: int | None = None,
    batch_size: int = 256,
    train: bool | None = None,
    augment: Augment | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: torch.device | str = "auto",
    cache: CacheChoice = "auto",
    kernel: Kernel = "pil",
    crop_fraction: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
) -> Batches:
    """Batches of one split for any training loop: decoded, resized and normalised on the device.

    An iteration is one epoch of images (N, 3, res, res) channels_last and labels (N,) int64. ``len`` is its steps,
    ``set_epoch`` chooses which, and ``state_dict`` and ``load_state_dict`` resume within it.

    Examples:
        >>> from tidali import make_loader
        >>> loader = make_loader("data/demo", "train", res=32, batch_size=32, device="cpu")
        >>> batches = iter(loader)
        >>> images, labels = next(batches)
        >>> state = loader.state_dict()
        >>> following, _ = next(batches)
        >>> loader.load_state_dict(state)
        >>> torch.equal(next(iter(loader))[0], following)
        True

    Args:
        data: an open data set, or its folder or URL.
        res: side of the images in pixels; by default their own where they all agree, else 224.
        batch_size: of this rank.
        train: shuffle, augment, and drop an incomplete last batch; otherwise the loader returns every image exactly once, in
            stored order. By default where the split is ``train``.
        augment: of training images; by default none.
        mean: per RGB channel on a 0..1 scale; by default that of the data set's train split.
        std: per RGB channel on a 0..1 scale; by default that of the data set's train split.
        device: where the batches are; ``auto`` takes a GPU where there is one.
        cache: ``device`` decodes once into the device's memory, ``off`` streams; ``auto`` caches what takes less than half of
            what is free.
        crop_fraction: fraction of the shorter side that the centre crop keeps, where no random crop is asked for.
        seed: of the order and the augmentation.
        rank: of this process, from 0; given together with ``world_size`` or not at all. By default torch.distributed's where it
            is initialised; every rank must then make the loader, as the one with the least memory decides whether all cache.
            Otherwise one rank loads everything.
        world_size: the number of ranks.

    Raises:
        UsageError: wrong arguments, such as a batch larger than the split.
        DatasetError: no data set there, or a damaged one, or no such split.
        TidaliError: it cannot be reached or read.
    """
    if (rank is None) != (world_size is None):
        raise UsageError("rank and world_size: give both of them, or neither")
    dataset = open_data(data) if isinstance(data, str) else data
    res = dataset.default_res if res is None else res
    check_res(res)
    ranks = _joined_ranks() if rank is None or world_size is None else Ranks(rank=rank, world_size=world_size)
    preprocess = Preprocess(
        res=res,
        mean=dataset.manifest.mean if mean is None else (mean[0], mean[1], mean[2]),
        std=dataset.manifest.std if std is None else (std[0], std[1], std[2]),
        kernel=kernel,
        crop_fraction=crop_fraction,
    )
    trains = split == "train" if train is None else train
    where = plan_device("auto", "off", "off").device if device == "auto" else torch.device(device)
    return Data(dataset, where, cache=cache, ranks=ranks).batches(
        split,
        preprocess,
        batch_size,
        training=Training(augment=augment or Augment(), seed=seed) if trains else None,
        dtype=dtype,
    )


def _joined_ranks() -> Ranks:
    """The ranks of a process group that the calling program has joined."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Ranks()
    return Ranks(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size(), joined=True)


def train_model(settings: TrainSettings, *, resume: bool = False, model: nn.Module | None = None) -> RunResult:
    """Train as ``tidali train`` does, into the run folder ``settings.out``.

    Args:
        resume: resume from the state in ``settings.out``, which was saved by a run of the same settings.
        model: a network of your own, from images (N, 3, res, res) to logits (N, classes), which is trained in place, with
            everything that a run has. Its checkpoints hold weights alone, so resuming and `load_model` need the network again,
            and the commands eval, predict and export do not apply; neither do the settings ``arch``, ``stem`` and ``init``.

    Raises:
        TidaliError: the settings, the data or the device do not allow the run; see `tidali.training.run.train`.
    """
    if model is not None:
        settings = replace(settings, arch="own")
    return train(settings, open_data(settings.data), resume=resume, model=model)
