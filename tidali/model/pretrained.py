"""Starting weights: none, torchvision's ImageNet weights, or a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from tidali.config import IMAGENET_MEAN, IMAGENET_STD, StemInit
from tidali.dataset.contract import Dataset
from tidali.errors import TidaliError, UsageError, first_line
from tidali.files import file_digest
from tidali.model.checkpoint import SUFFIX, find_checkpoint, load_checkpoint, read_safetensors
from tidali.model.resnet import LoadReport, load_matching, weights_only

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation per RGB channel on a 0..1 scale."""

IMAGENET_CLASSES = 1000
IMAGENET_NAME = "torchvision IMAGENET1K_V1"
NO_NORMALISATION: Normalisation = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def imagenet_weights_path() -> Path:
    """The file in torch's cache folder where torchvision stores the weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]


def imagenet_sha256() -> str:
    """How the hash of these weights begins: torchvision has it in the name of the file, resnet18-f37072fd.pth."""
    return imagenet_weights_path().stem.rpartition("-")[2]


def imagenet_weights() -> dict[str, Tensor]:
    """torchvision's ``ResNet18_Weights.IMAGENET1K_V1``, from the cache or downloaded, with the hash checked.

    Raises:
        TidaliError: not in the cache and not downloadable, or the cached file is a different one.
    """
    weights, path = ResNet18_Weights.IMAGENET1K_V1, imagenet_weights_path()
    try:
        # torch checks the hash of its own downloads only.
        if path.exists() and not file_digest(path).startswith(imagenet_sha256()):
            raise TidaliError(
                f"--init imagenet: {path} is damaged or a different file (its SHA-256 is not the one in its name); remove it"
            )
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (URLError, OSError, RuntimeError) as error:
        raise TidaliError(
            f"--init imagenet: cannot download the weights ({first_line(error)}); "
            f"put {weights.url} at {path}, or give --init PATH"
        ) from None


def file_weights(given: str) -> tuple[dict[str, Tensor], Normalisation | None, str]:
    """The tensors of a tidali checkpoint, a plain safetensors file or a torchvision ``.pth``; no pickled code is run.

    Returns:
        The tensors; the normalisation that they were trained with, if known (it is in a tidali checkpoint, and a head of 1,000
        classes is taken to be ImageNet's); and the file that was read.

    Raises:
        UsageError: no such file, or it does not hold weights.
    """
    if given.endswith((".pth", ".pt")):
        path = Path(given)
        try:
            weights = weights_only(torch.load(path, map_location="cpu", weights_only=True), given)
            return weights, _normalisation_of(weights), str(path)
        except FileNotFoundError:
            raise UsageError(f"--init {given}: no such file") from None
        except Exception as error:  # torch.load raises whatever its unpickler met
            raise UsageError(f"--init {given}: not loadable as plain weights ({first_line(error)})") from None
    path = find_checkpoint(given)
    if path.suffix != SUFFIX:
        raise UsageError(f"--init {given}: give a {SUFFIX}, .pth or .pt file")
    weights, metadata = read_safetensors(path)
    if "tidali" not in metadata:
        weights = weights_only(weights, given)
        return weights, _normalisation_of(weights), str(path)
    card, weights = load_checkpoint(path)
    return weights, (card.mean, card.std), str(path)


def _normalisation_of(weights: Mapping[str, Tensor]) -> Normalisation | None:
    """ImageNet's for a head of 1,000 classes; otherwise unknown."""
    head = weights.get("fc.bias")
    return (IMAGENET_MEAN, IMAGENET_STD) if head is not None and len(head) == IMAGENET_CLASSES else None


def apply_init(model: nn.Module, init: str, stem_init: StemInit = "fresh") -> tuple[LoadReport | None, Normalisation | None]:
    """Load the starting weights into the model.

    Returns:
        A report of the loaded tensors, and the normalisation that the weights were trained with, if known.
    """
    if init == "none":
        return None, None
    if init == "imagenet":
        report = load_matching(model, imagenet_weights(), "ImageNet weights", stem_init=stem_init)
        return report, (IMAGENET_MEAN, IMAGENET_STD)
    weights, normalisation, where = file_weights(init)
    return load_matching(model, weights, where, stem_init=stem_init), normalisation


def choose_normalisation(normalise: bool, init_normalisation: Normalisation | None, dataset: Dataset) -> Normalisation:
    """No normalisation where the recipe has none; else that of the starting weights, if known; else the data set's own."""
    if not normalise:
        return NO_NORMALISATION
    if init_normalisation is not None:
        return init_normalisation
    return dataset.manifest.mean, dataset.manifest.std
