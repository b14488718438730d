"""What the runs of a study were made from. A finished run is kept only if its settings, images and weights are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tidali.config import Arch, TrainSettings
from tidali.dataset.contract import Dataset
from tidali.errors import TidaliError, UsageError
from tidali.files import file_digest
from tidali.model.pretrained import IMAGENET_NAME, file_weights, imagenet_weights, imagenet_weights_path
from tidali.study.rows import IMAGENET
from tidali.training.run_folder import write_json

INPUTS_NAME = "inputs.json"
"""Beside the run folders: for each, by its name, the hashes of everything besides the settings that decides its result."""


def find_imagenet_weights(given: str | None, arch: Arch) -> dict[str, str]:
    """The name, the path and the hash of the weights that rows start from: a file's, or else torchvision's, which are
    downloaded once.

    Raises:
        UsageError: the file is not there, or holds no weights of a ResNet.
        TidaliError: torchvision's cannot be had.
    """
    try:
        if given is None:
            imagenet_weights(arch)
            return {"name": IMAGENET_NAME, "path": IMAGENET, "sha256": file_digest(imagenet_weights_path(arch))}
        path = file_weights(given).where
    except TidaliError as error:
        text = str(error).replace("--init imagenet", "ImageNet's weights").replace("--init", "--imagenet-weights")
        raise type(error)(text) from None
    return {"name": given, "path": path, "sha256": file_digest(Path(path))}


def content_hash(dataset: Dataset, split: str) -> str:
    """Hash of the samples of a split, with their order and shards."""
    return hashlib.sha256(dataset.split(split).content.encode()).hexdigest()


def record_inputs(folder: Path, inputs: Mapping[str, str | None]) -> None:
    """Record, before the run, what the run in this folder will be made from."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(folder.parent / INPUTS_NAME, {**read_json(folder.parent / INPUTS_NAME), folder.name: inputs})


def refuse_other_inputs(folder: Path, wanted: TrainSettings, inputs: Mapping[str, str | None]) -> None:
    """
    Raises:
        UsageError: the run in the folder was made with other settings, or from other images or weights, or there is no record
            of them.
    """

    def comparable(settings: TrainSettings) -> dict[str, Any]:
        return {**settings.to_dict(), "data": "", "init": "", "out": ""}  # the first two are compared by their content

    config, record = folder / "config.json", folder.parent / INPUTS_NAME
    made = comparable(TrainSettings.from_dict(read_json(config), str(config)))
    settings = [name for name, value in comparable(wanted).items() if made[name] != value]
    recorded = read_json(record).get(folder.name, {})
    sources = [name for name, value in inputs.items() if recorded.get(name) != value]
    how = f"with other settings ({', '.join(settings)})" if settings else f"from other {' and '.join(sources)}, see {record}"
    if settings or sources:
        raise UsageError(f"{folder}: made {how}; give another --out, or remove the folder to train it again")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON document; empty if there is no such file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); remove it to make its content again") from None
