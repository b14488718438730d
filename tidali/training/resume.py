"""The complete state of a run in one file, from which a killed run is resumed with the same results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tidali.config import CacheChoice, TrainSettings
from tidali.console import warn
from tidali.errors import UsageError, first_line
from tidali.model.checkpoint import STATE_KEY, SUFFIX, ModelCard, read_metadata, read_safetensors, write_safetensors
from tidali.training.engine import TrainState
from tidali.training.metrics import Meter, Score

STATE_NAME = f"state{SUFFIX}"
_VERSION = 2
_MAY_CHANGE = frozenset(
    {
        *("data", "out", "init", "device", "compile", "cache", "decoder", "max_bad"),
        *("deterministic", "checkpoint_minutes", "tensorboard"),
    }
)
"""Settings that may differ in a resumed run: those that change weights by rounding at most, and those whose contents are
compared instead: the data through the order, and the starting weights through their normalisation."""


@dataclass(kw_only=True)
class Progress:
    """How far a run is, without its tensors."""

    epoch: int = 0
    """Of the next step, counted from 0."""
    best: Score | None = None
    best_epoch: int = 0
    last: Score | None = None
    images_per_s: list[float]
    """Of each epoch done."""
    seconds: float = 0.0
    """Spent before the run was last resumed."""


class SavedState(NamedTuple):
    """A state of its own, which training does not change any more."""

    tensors: Mapping[str, Tensor]
    """On the CPU."""
    document: str
    """JSON."""


def copy_state(
    state: TrainState, progress: Progress, meter: Meter, loaders: Sequence[Mapping[str, Any]], card: ModelCard
) -> SavedState:
    """
    Args:
        meter: the counts of the current epoch so far.
        loaders: `state_dict` of every rank's training batches, JSON-able.
        card: of the run's checkpoints: its classes, settings and versions.
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
        "run": asdict(card),
    }
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return SavedState(copies, json.dumps(document))


def write_state(path: Path, state: SavedState) -> None:
    """Write the state; the file appears whole or not at all.

    Raises:
        TidaliError: it cannot be written; the previous state is still there.
    """
    write_safetensors(path, state.tensors, {STATE_KEY: state.document})


def read_document(path: Path) -> dict[str, Any]:
    """The JSON document of a saved state.

    Raises:
        UsageError: no state, or it cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"--resume {path.parent}: holds no {STATE_NAME}, so nothing can be resumed; remove it and train again")
    try:
        document = json.loads(read_metadata(path)[STATE_KEY])
        version = document["version"]
    except (KeyError, ValueError, TypeError):
        raise UsageError(f"{path}: not the state of a run") from None
    if version != _VERSION:
        raise UsageError(f"{path}: a state of version {version}, this tidali resumes version {_VERSION} only; train again")
    return dict(document)


def saved_route(path: Path) -> CacheChoice:
    """The route that the run began with: free memory must not change it on resuming.

    Raises:
        UsageError: no state, or it cannot be read.
    """
    try:
        return "device" if read_document(path)["loaders"][0]["order"]["route"] == "cache" else "off"
    except (KeyError, IndexError, TypeError):
        raise UsageError(f"{path}: not the state of a run") from None


def load_state(path: Path, state: TrainState, meter: Meter, card: ModelCard, rank: int = 0) -> tuple[Progress, dict[str, Any]]:
    """Load a saved state into a new one of the same settings. Warns where it was saved with other versions.

    Args:
        card: of this run's checkpoints.

    Returns:
        The progress, and the `state_dict` of this rank's training batches, or the last rank's where there were fewer ranks.

    Raises:
        UsageError: no state, or one that does not fit, or one of other settings or classes.
    """
    document = read_document(path)
    try:
        _check_same_run(path, document["run"], json.loads(json.dumps(asdict(card))))
        _restore(read_safetensors(path)[0], document, state, meter, rank)
        progress = document["progress"]
        for name in ("best", "last"):
            progress[name] = Score(**progress[name]) if progress[name] else None
        loaders = document["loaders"]
        return Progress(**progress), loaders[min(rank, len(loaders) - 1)]
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{path}: does not fit this run ({first_line(error)})") from None


def _check_same_run(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """
    Raises:
        UsageError: settings that determine the weights differ.
    """

    def deciding(card: Mapping[str, Any]) -> dict[str, Any]:
        known = TrainSettings.from_dict(card["settings"], str(path)).to_dict()  # with defaults for what an older version lacks
        settings = {name: value for name, value in known.items() if name not in (*_MAY_CHANGE, "recipe")}
        recipe = {f"recipe.{name}": value for name, value in known["recipe"].items()}
        normalisation = {name: card[name] for name in ("mean", "std")}
        return {**settings, **recipe, **normalisation, "classes": [one["id"] for one in card["classes"]]}

    then, now = deciding(saved), deciding(own)
    different = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if different:
        raise UsageError(
            f"{path}: saved with other settings ({', '.join(different)}); resume with those, or train again with --config"
        )
    changed = [
        f"{name} {saved['versions'].get(name)} then, {version} now"
        for name, version in own["versions"].items()
        if saved["versions"].get(name) != version
    ]
    if changed:
        warn(f"resumed with other versions, so results may differ in the last bit: {'; '.join(changed)}")


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
    if document["scaler"]:  # empty where it was saved in a precision that needs none, by another device's --amp auto
        state.scaler.load_state_dict(document["scaler"])
    state.step = document["step"]
    if rank == 0:  # rank 0 saved its own counts; the other ranks' counts of this epoch so far are lost
        meter.sums.copy_(tensors["meter"])
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and state.plan.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], state.plan.device)
