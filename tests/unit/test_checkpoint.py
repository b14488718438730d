"""Checkpoints: written whole or not at all, read back to the bit, and refused in one line."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision

from tidali.dataset.contract import ClassName
from tidali.errors import TidaliError, UsageError
from tidali.files import write_atomically
from tidali.model.checkpoint import (
    ModelCard,
    find_checkpoint,
    load_checkpoint,
    load_model,
    read_safetensors,
    save_checkpoint,
    write_safetensors,
)
from tidali.model.resnet import build_resnet18

CARD = ModelCard(
    classes=tuple(ClassName(id=f"n{number}", name=name) for number, name in enumerate(("chat noir", "狗", "owl"))),
    stem="imagenet",
    stem_bias=False,
    res=64,
    mean=(0.1, 1 / 3, 0.7),
    std=(0.2, 0.3, 0.4),
    metrics={"epoch": 2, "val_top1_percent": 83.25},
    settings={"recipe": {"lr": 0.1}},
    versions={"torch": "9"},
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A checkpoint and the model it was saved from, with batch norm statistics that are not the initial ones."""
    model = build_resnet18(3, "imagenet").to(memory_format=torch.channels_last)
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32))
    path = tmp_path_factory.mktemp("saved") / "best.safetensors"
    save_checkpoint(path, model, CARD)
    return path, model.eval()


def test_round_trip(saved: tuple[Path, torch.nn.Module]) -> None:
    path, model = saved
    card, weights = load_checkpoint(path)
    assert card == CARD
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())

    again, card = load_model(path)
    assert card == CARD
    assert not again.training
    assert again.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))  # the same arithmetic on the same bits
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


def test_small_stem_round_trip(tmp_path: Path) -> None:
    model = build_resnet18(3, "small", stem_bias=True)
    save_checkpoint(tmp_path / "x.safetensors", model, replace(CARD, stem="small", stem_bias=True))
    again, _ = load_model(tmp_path / "x.safetensors")
    assert torch.equal(again.conv1.bias, model.conv1.bias)


def test_torchvision_loads_the_weights_by_name(saved: tuple[Path, torch.nn.Module]) -> None:
    plain = torchvision.models.resnet18(num_classes=3)
    plain.load_state_dict(safetensors.torch.load_file(saved[0]), strict=True)


@pytest.mark.parametrize("given", ["run/best.safetensors", "run/best", "run", "run/"])
def test_paths_that_mean_the_best_checkpoint(monkeypatch, tmp_path: Path, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/best.safetensors").touch()
    (tmp_path / "run/last.safetensors").touch()
    assert find_checkpoint(given) == Path("run/best.safetensors")
    assert find_checkpoint("run/last") == Path("run/last.safetensors")


@pytest.mark.parametrize("given", ["none", "run", ".", "/", "", "..", "run/none"])
def test_paths_that_mean_none(monkeypatch, tmp_path: Path, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match="no such checkpoint"):
        find_checkpoint(given)


def _with_metadata(path: Path, metadata: dict[str, str]) -> None:
    safetensors.torch.save_file({"fc.bias": torch.zeros(3)}, path, metadata=metadata)


def _card(**changes: object) -> dict[str, str]:
    document = {"classes": [{"id": "a", "name": "a"}], "stem": "imagenet", "stem_bias": False, "res": 64, "version": 1}
    return {"tidali": json.dumps({**document, "mean": [0, 0, 0], "std": [1, 1, 1], **changes})}


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a readable safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:3]), "not a readable safetensors file"),
        (lambda path: path.write_bytes(b""), "not a readable safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 64), "not a readable safetensors file"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: _with_metadata(path, {}), "no tidali metadata .* --init only"),
        (lambda path: _with_metadata(path, {"tidali": "{"}), "metadata is damaged"),
        (lambda path: _with_metadata(path, {"tidali": "3"}), "metadata is damaged"),
        (lambda path: _with_metadata(path, _card(version=3)), "written by a newer tidali"),
        (lambda path: _with_metadata(path, _card(surprise=1)), "metadata is damaged .*surprise"),
        (lambda path: _with_metadata(path, _card(classes=[3])), "metadata is damaged"),
        (lambda path: _with_metadata(path, _card()), "the weights do not fit the model"),
    ],
)
def test_damaged_checkpoint_is_one_line(saved, tmp_path: Path, damage, complaint: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(saved[0].read_bytes())
    damage(path)
    with pytest.raises(UsageError, match=rf"^\S+x\.safetensors: .*{complaint}") as refused:
        load_model(path)
    assert "\n" not in str(refused.value)


def test_a_changed_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3, 5), "b": torch.tensor(7), "c": torch.randn(4, dtype=torch.bfloat16), "d": torch.zeros(0)}
    write_safetensors(path, tensors, {"tidali": "{}"})
    good = path.read_bytes()
    assert read_safetensors(path)[0].keys() == tensors.keys()
    for position in range(8 + int.from_bytes(good[:8], "little"), len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        with pytest.raises(UsageError, match=r"x\.safetensors: damaged"):
            read_safetensors(path)
    path.write_bytes(good.replace(b'"{}"', b'"{ "'))
    with pytest.raises(UsageError, match=r"x\.safetensors: damaged"):
        read_safetensors(path)


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_full_disk_leaves_the_old_file(monkeypatch, tmp_path: Path, failing: str) -> None:
    path = tmp_path / "last.safetensors"
    write_atomically(path, b"old")

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failing == "write":  # a full disk may show as early as the first write
        monkeypatch.setattr(Path, "open", full)
    elif failing == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(TidaliError, match=r"last\.safetensors: cannot be written \(No space left on device\)"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TidaliError, match="cannot be written"):
        write_atomically(tmp_path / "none" / "x", b"new")
