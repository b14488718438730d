"""Model checkpoints: a safetensors file with the weights under torchvision's names, and everything else as JSON metadata."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tidali.config import AmpChoice, AnyArch, DeviceChoice, Kernel, Preprocess, Stem
from tidali.dataset.contract import ClassName, Dataset
from tidali.errors import UsageError, first_line
from tidali.files import write_atomically
from tidali.hardware.device import DevicePlan, plan_device
from tidali.model.resnet import ARCHITECTURES, build_resnet, load_matching, refuse_not_finite
from tidali.model.weight_files import TORCH, is_safetensors, what_is

SUFFIX = ".safetensors"
EVAL_BATCH_SIZE = 256
"""The same in training runs, ``tidali eval`` and ``tidali predict``, so that they compute the same results to the bit."""
METADATA_KEY = "tidali"  # safetensors metadata maps strings to strings: under this key, a JSON document
STATE_KEY = "tidali-state"
"""In place of `METADATA_KEY` in the state of a run (`tidali.training.resume`)."""
CHECKSUM_KEY = "tidali-crc32"
"""safetensors itself has no checksum."""
_METADATA_VERSION = 2
"""1: before `ModelCard.arch`, always ResNet-18's."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A checkpoint's metadata: enough to rebuild the model and to preprocess images as in its evaluation."""

    classes: tuple[ClassName, ...]
    """In label order."""
    stem: Stem
    stem_bias: bool
    res: int
    """Input side that it was trained at, in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per RGB channel on a 0..1 scale."""
    kernel: Kernel = "pil"
    """Bicubic kernel that its images were resized with."""
    crop_fraction: float = 1.0
    """Share of the shorter side that its evaluation kept."""
    arch: AnyArch = "resnet18"
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the evaluation after which the checkpoint was saved."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    version: int = _METADATA_VERSION

    def preprocess(self, res: int | None = None) -> Preprocess:
        """How its evaluation made input of stored pixels, at ``res`` or the resolution that it was trained at."""
        return Preprocess(
            res=res or self.res, mean=self.mean, std=self.std, kernel=self.kernel, crop_fraction=self.crop_fraction
        )

    def build_model(self) -> nn.Module:
        """The model that the weights belong to, with random weights.

        Raises:
            UsageError: it is not one of tidali's own.
        """
        if self.arch == "own":
            raise UsageError(
                "the weights of a network of your own, which is not in the file: tidali.load_model(PATH, model=...)"
            )
        return build_resnet(self.arch, len(self.classes), self.stem, stem_bias=self.stem_bias)


def save_checkpoint(path: Path, weights: nn.Module | Mapping[str, Tensor], card: ModelCard) -> None:
    """Write the weights of a model, not compiled, or its state dict, and the card; the file appears whole or not at all.

    Raises:
        TidaliError: it cannot be written; a file that was at `path` before is unchanged.
    """
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_safetensors(path, state, {METADATA_KEY: json.dumps(asdict(card))})


def find_checkpoint(given: str) -> Path:
    """The checkpoint file that a path stands for: itself, itself plus the suffix, or the best one of a run folder.

    Raises:
        UsageError: there is none.
    """
    path = Path(given)
    for candidate in (path, Path(f"{given}{SUFFIX}"), path / f"best{SUFFIX}"):
        if candidate.is_file():
            return candidate
    raise UsageError(f"{given}: no such checkpoint (looked for the file, {path.name}{SUFFIX} and {path.name}/best{SUFFIX})")


def load_checkpoint(path: Path) -> tuple[ModelCard, dict[str, Tensor]]:
    """The card and the weights of a checkpoint file.

    Raises:
        UsageError: not a tidali checkpoint, or one of a newer version.
    """
    weights, metadata = read_safetensors(path)
    if METADATA_KEY not in metadata:
        raise UsageError(
            f"{path}: holds weights but no tidali metadata (class names, preprocessing); it can serve as --init only"
        )
    try:
        document = json.loads(metadata[METADATA_KEY])
        if document["version"] > _METADATA_VERSION:
            raise UsageError(f"{path}: written by a newer tidali (metadata version {document['version']}); update tidali")
        document["classes"] = tuple(ClassName(**c) for c in document["classes"])
        document["mean"], document["std"] = tuple(document["mean"]), tuple(document["std"])
        return ModelCard(**document), weights
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path}: its tidali metadata is damaged ({type(error).__name__}: {error})") from None


def load_model(path: Path, model: nn.Module | None = None) -> tuple[nn.Module, ModelCard]:
    """The model of a checkpoint file, on the CPU, channels-last and in evaluation mode, and its card.

    Args:
        model: where the weights are of a network of the user's own: that network.

    Raises:
        UsageError: not a tidali checkpoint, or its weights do not fit the model that its card describes, or are not finite.
    """
    card, weights = load_checkpoint(path)
    if card.arch not in (*ARCHITECTURES, "own"):
        raise UsageError(f"{path}: the weights of a network that this tidali does not know, {card.arch!r}")
    if model is not None:
        return _with_weights(model, weights, path), card
    try:
        model = card.build_model()
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    assert card.arch != "own"
    report = load_matching(model, weights, str(path), arch=card.arch)
    if report.fresh or report.unused:
        different = ", ".join([*report.fresh, *report.unused][:3])
        raise UsageError(f"{path}: the weights do not fit the model that its metadata describes ({different})")
    return model.to(memory_format=torch.channels_last).eval(), card


def _with_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> nn.Module:
    """
    Raises:
        UsageError: the weights are not the model's, or not finite.
    """
    refuse_not_finite(weights, str(path))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"{path}: the weights do not fit the model that was given ({first_line(error)})") from None
    return model.to("cpu", memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def open_checkpoint(
    given: str,
    dataset: Dataset | None = None,
    *,
    device: DeviceChoice,
    amp: AmpChoice,
    model: nn.Module | None = None,
) -> tuple[nn.Module, ModelCard, DevicePlan]:
    """Find and load a checkpoint, and put it on its device.

    Args:
        given: see `find_checkpoint`.
        dataset: the data set whose classes the checkpoint must have, if any.
        model: the network, where it is the user's own.

    Returns:
        The model, on the plan's device, in evaluation mode and channels-last; its card; and the plan.

    Raises:
        UsageError: no checkpoint there, or one for other classes than the data set's.
        TidaliError: ``cuda`` was asked for and is not available.
    """
    model, card = load_model(find_checkpoint(given), model)
    if dataset is not None:
        check_classes(card, dataset, given)
    plan = plan_device(device, amp, "off")
    return model.to(plan.device), card, plan


def check_classes(card: ModelCard, dataset: Dataset, given: str) -> None:
    """
    Raises:
        UsageError: the checkpoint's labels do not mean the data set's classes.
    """
    own, others = [c.id for c in card.classes], [c.id for c in dataset.manifest.classes]
    if len(own) != len(others):
        raise UsageError(
            f"{given}: a head of {len(own)} classes, {dataset.root} has {len(others)}; evaluate it on its own data"
        )
    for label, (ours, theirs) in enumerate(zip(own, others, strict=True)):
        if ours != theirs:
            raise UsageError(
                f"{given}: class {label} is {ours!r}, in {dataset.root} it is {theirs!r}; evaluate it on its own data"
            )


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors on the CPU, and metadata with a checksum of all; the file appears whole or not at all.

    Raises:
        TidaliError: it cannot be written; a file that was at `path` before is unchanged.
    """
    write_atomically(path, save(dict(tensors), metadata={**metadata, CHECKSUM_KEY: _checksum(tensors, metadata)}))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        UsageError: it cannot be read, or is not a safetensors file, or its content is not what tidali wrote.
    """
    with _open_safetensors(path) as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    checksum = metadata.pop(CHECKSUM_KEY, None)  # other programs' files and those of earlier versions have none
    if checksum is not None and checksum != _checksum(tensors, metadata):
        raise UsageError(f"{path}: damaged, or changed by another program (its CRC-32 is another); copy it or train again")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The CRC-32 of names, types, shapes, bytes and metadata."""
    crc = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors.

    Raises:
        UsageError: it cannot be read, or is not a safetensors file.
    """
    with _open_safetensors(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError):
        why = "damaged, or cut off" if is_safetensors(path) else what_is(path)
        if why == TORCH:
            why += ", which can serve as --init only"
        raise UsageError(f"{path}: not a readable safetensors file ({why})") from None
