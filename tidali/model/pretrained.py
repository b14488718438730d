"""Starting weights: none, torchvision's ImageNet weights, or a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from tidali.config import IMAGENET_MEAN, IMAGENET_STD, Arch, StemInit
from tidali.dataset.contract import ClassName, Dataset
from tidali.errors import TidaliError, UsageError, first_line
from tidali.files import file_digest
from tidali.model.checkpoint import METADATA_KEY, STATE_KEY, find_checkpoint, load_checkpoint, read_metadata, read_safetensors
from tidali.model.resnet import ARCHITECTURES, LoadReport, load_matching
from tidali.model.weight_files import find_state_dict, is_safetensors, read_torch

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation per RGB channel on a 0..1 scale."""

IMAGENET_CLASSES = 1000
IMAGENET_NAME = "torchvision IMAGENET1K_V1"
NO_NORMALISATION: Normalisation = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def imagenet_weights_path(arch: Arch = "resnet18") -> Path:
    """The file in torch's cache folder where torchvision stores the weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / ARCHITECTURES[arch].weights_file


def imagenet_weights(arch: Arch = "resnet18") -> dict[str, Tensor]:
    """torchvision's ``IMAGENET1K_V1`` weights, from the cache or downloaded, with the hash checked.

    Raises:
        TidaliError: not in the cache and not downloadable, or the cached file is a different one.
    """
    architecture, path = ARCHITECTURES[arch], imagenet_weights_path(arch)
    weights = architecture.weights
    try:
        # torch checks the hash of its own downloads only.
        if path.exists() and not file_digest(path).startswith(architecture.weights_sha256):
            raise TidaliError(
                f"--init imagenet: {path} is damaged or a different file (its SHA-256 is not the one in its name); remove it"
            )
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (URLError, OSError, RuntimeError) as error:
        raise TidaliError(
            f"--init imagenet: cannot download the weights ({first_line(error)}); "
            f"put {weights.url} at {path}, or give --init PATH"
        ) from None


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """A ResNet's weights, and what is known of how they were trained."""

    where: str
    tensors: Mapping[str, Tensor]
    """By torchvision's names."""
    others: tuple[str, ...] = ()
    """What else is in the file, by name."""
    normalisation: Normalisation | None
    classes: tuple[ClassName, ...] | None = None
    """In label order; None where the file does not name them."""


def file_weights(given: str) -> InitialWeights:
    """The weights in a tidali checkpoint, or in a safetensors file or one of ``torch.save`` by any program, wherever the state
    dict is in it; no pickled code is run.

    The normalisation is in a tidali checkpoint; a head of 1,000 classes is taken to be ImageNet's.

    Raises:
        UsageError: no such file, or it does not hold the weights of a ResNet.
    """
    try:
        path = find_checkpoint(given)
        where = str(path)
        metadata = read_metadata(path) if is_safetensors(path) else None
        if metadata is None:
            document = read_torch(path)
        elif METADATA_KEY in metadata:
            card, tensors = load_checkpoint(path)
            return InitialWeights(where=where, tensors=tensors, normalisation=(card.mean, card.std), classes=card.classes)
        elif STATE_KEY in metadata:
            raise UsageError(f"{path}: the state of a run, for --resume; give the run's best or last checkpoint")
        else:
            document = read_safetensors(path)[0]
        found = find_state_dict(document, where)
    except UsageError as error:
        raise UsageError(f"--init {error}") from None
    head = found.tensors.get("fc.bias")
    of_imagenet = head is not None and head.shape == (IMAGENET_CLASSES,)
    normalisation = (IMAGENET_MEAN, IMAGENET_STD) if of_imagenet else None
    return InitialWeights(where=where, tensors=found.tensors, others=found.others, normalisation=normalisation)


def apply_init(
    model: nn.Module,
    init: str,
    stem_init: StemInit = "fresh",
    classes: Sequence[ClassName] = (),
    *,
    arch: Arch = "resnet18",
) -> tuple[LoadReport | None, Normalisation | None]:
    """Load the starting weights into the model.

    Args:
        arch: the model's.
        classes: the model's, in label order: the report says where a head was loaded that may be for others.

    Returns:
        A report of the loaded tensors, and the normalisation that the weights were trained with, if known.
    """
    if init == "none":
        return None, None
    if init == "imagenet":
        given = InitialWeights(where=init, tensors=imagenet_weights(arch), normalisation=ARCHITECTURES[arch].normalisation)
    else:
        given = file_weights(init)
    report = load_matching(model, given.tensors, f"--init {given.where}", arch=arch, stem_init=stem_init)
    notes = (note,) if "fc.weight" in report.loaded and (note := _other_head(given.classes, classes)) else ()
    return replace(report, unused=(*report.unused, *given.others), notes=notes), given.normalisation


def _other_head(trained: Sequence[ClassName] | None, own: Sequence[ClassName]) -> str:
    """What to say of a head that was loaded; empty if it is known to be for the model's classes."""
    if trained is None:
        return f"the head was loaded too: the file does not say which {len(own)} classes it is for"
    pairs = enumerate(zip((one.id for one in trained), (one.id for one in own), strict=False))
    different = next((f"class {label} was {theirs!r} and is {ours!r}" for label, (theirs, ours) in pairs if theirs != ours), "")
    return different and f"the head was loaded too, which was trained for other classes: {different} here"


def choose_normalisation(normalise: bool, init_normalisation: Normalisation | None, dataset: Dataset) -> Normalisation:
    """No normalisation where the recipe has none; else that of the starting weights, if known; else the data set's own."""
    if not normalise:
        return NO_NORMALISATION
    if init_normalisation is not None:
        return init_normalisation
    return dataset.manifest.mean, dataset.manifest.std
