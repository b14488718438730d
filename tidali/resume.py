"""The complete state of a run, in one file: what lets a killed run go on as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tidali.checkpoint import SUFFIX, read_safetensors
from tidali.engine import TrainState
from tidali.errors import UsageError
from tidali.files import write_atomically
from tidali.metrics import Meter, Score

STATE_NAME = f"state{SUFFIX}"
_METADATA_KEY = "tidali-state"
_VERSION = 1


@dataclass(kw_only=True)
class Progress:
    """Where a run is, besides its tensors."""

    epoch: int = 0
    """Of the step to come, counted from 0."""
    best: Score | None = None
    best_epoch: int = 0
    last: Score | None = None
    images_per_s: list[float]
    """Of each epoch done."""
    seconds: float = 0.0
    """Spent in earlier sittings."""


def save_state(
    path: Path,
    state: TrainState,
    progress: Progress,
    meter: Meter,
    loaders: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
) -> None:
    """Write everything; the file appears whole or not at all.

    Args:
        meter: the running counts of the epoch in hand.
        loaders: `state_dict` of every rank's training batches, JSON-able.

    Raises:
        TidaliError: it cannot be written; the previous state is still there.
    """
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    if state.ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in state.ema.model.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
    tensors["meter"] = meter.sums
    tensors["rng.cpu"] = torch.get_rng_state()
    if state.plan.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(state.plan.device)
    document = {
        "version": _VERSION,
        "step": state.step,
        "scaler": state.scaler.state_dict(),
        "progress": asdict(progress),
        "loaders": loaders,
        "settings": settings,
        "versions": versions,
    }
    content = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={_METADATA_KEY: json.dumps(document)},
    )
    write_atomically(path, content)


def load_state(path: Path, state: TrainState, meter: Meter, rank: int = 0) -> tuple[Progress, dict[str, Any]]:
    """Put a saved state into a freshly made one of the same settings.

    Returns:
        The progress, and the `state_dict` of this rank's training batches, or of the last rank's where there were fewer.

    Raises:
        UsageError: no state, or one that does not fit.
    """
    if not path.is_file():
        raise UsageError(f"--resume {path.parent}: holds no {STATE_NAME}, so there is nothing to go on from")
    tensors, metadata = read_safetensors(path)
    try:
        document = json.loads(metadata[_METADATA_KEY])
        _restore(tensors, document, state, meter, rank)
        progress = document["progress"]
        for name in ("best", "last"):
            progress[name] = Score(**progress[name]) if progress[name] else None
        loaders = document["loaders"]
        return Progress(**progress), loaders[min(rank, len(loaders) - 1)]
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path}: does not fit this run ({reason})") from None


def _restore(tensors: Mapping[str, Tensor], document: Mapping[str, Any], state: TrainState, meter: Meter, rank: int) -> None:
    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    state.model.load_state_dict(under("model."))
    if state.ema is not None:
        state.ema.model.load_state_dict(under("ema."))
    optimizer = state.optimizer.state_dict()
    for name, tensor in under("optimizer.").items():
        index, _, key = name.partition(".")
        optimizer["state"].setdefault(int(index), {})[key] = tensor
    state.optimizer.load_state_dict(optimizer)
    for parameter, values in state.optimizer.state.items():
        # The fused kernel walks parameter and momentum in memory order, so their layouts must agree (channels_last).
        values.update({key: torch.empty_like(parameter).copy_(value) for key, value in values.items() if value is not None})
    state.scaler.load_state_dict(document["scaler"])
    state.step = document["step"]
    if rank == 0:  # rank 0 saved its own counts; those of the others up to here are lost to the epoch's training figures
        meter.sums.copy_(tensors["meter"])
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and state.plan.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], state.plan.device)
