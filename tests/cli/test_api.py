"""`tidali`'s own names: exactly ten, lazy, typed, and documented by examples that run here."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tidali
from tidali.config import Augment
from tidali.errors import UsageError

NAMES = {
    "Resample",
    "TidaliError",
    "TrainSettings",
    "build_resnet18",
    "evaluate_checkpoint",
    "load_model",
    "make_loader",
    "make_recipe",
    "open_data",
    "train_model",
}
DOCUMENTED = ["tidali", "tidali.api", "tidali.model.predict"]


def test_the_names() -> None:
    assert set(tidali.__all__) == NAMES
    assert set(dir(tidali)) >= NAMES
    for name in NAMES:
        value = getattr(tidali, name)
        assert value.__name__ == name
        assert value.__doc__ or name == "TidaliError"
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = tidali.nonsense
    with pytest.raises(ImportError):
        exec("from tidali import nonsense")


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse(Path(tidali.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {one.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for one in node.names}
    assert seen == tidali._HOMES
    assert seen.keys() == NAMES


@pytest.mark.parametrize("statement", ["import tidali", "from tidali import TidaliError, TrainSettings, make_recipe"])
def test_importing_is_light(statement: str) -> None:
    program = f"{statement}; import sys; print([name for name in ('torch', 'numpy', 'PIL', 'nvidia') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_names_survive_the_import_of_modules() -> None:
    """A submodule becomes an attribute of its package when it is imported, so none may have one of the public names."""
    modules = {path.stem for path in Path(tidali.__file__).parent.iterdir()}
    assert not modules & NAMES


@pytest.fixture
def newcomer(demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the examples speak of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/demo").symlink_to(demo_data)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 3), np.uint8)).save("photo.jpg")
    return tmp_path


def test_no_other_module_has_examples() -> None:
    paths = {path for path in Path(tidali.__file__).parent.rglob("*.py") if ">>> " in path.read_text()}
    assert paths == {Path(str(importlib.import_module(module).__file__)) for module in DOCUMENTED}


@pytest.mark.slow
def test_examples_run(newcomer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In order: the first trains the run that the others load."""
    ran = set()
    for module in map(importlib.import_module, DOCUMENTED):
        for example in doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__):
            if example.examples:
                result = doctest.DocTestRunner(verbose=False).run(example)
                assert result.failed == 0, capsys.readouterr().out
                ran.add(example.name)
    assert ran == {"tidali", "tidali.api.make_loader", "tidali.model.predict.load_model"}


@pytest.mark.slow
def test_loader_in_a_plain_loop_learns(demo_data: Path) -> None:
    """Nothing of tidali but the loader."""
    import torchvision

    torch.manual_seed(0)
    loader = tidali.make_loader(str(demo_data), "train", res=32, batch_size=32, device="cpu")
    network = torchvision.models.resnet18(num_classes=4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        total = 0.0
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / len(loader))
    assert losses[-1] < losses[0]


def test_loader_defaults(demo_data: Path) -> None:
    data = tidali.open_data(str(demo_data))
    val = tidali.make_loader(data, "val", device="cpu")
    batches = list(val)
    images, labels = torch.cat([some for some, _ in batches]), torch.cat([some for _, some in batches])
    assert (len(val), val.samples, images.shape) == (1, 32, (32, 3, 64, 64))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels.bincount(minlength=4), torch.tensor(data.split("val").class_counts))
    assert torch.equal(next(iter(tidali.make_loader(data, "val", device="cpu")))[1], labels)  # stored order

    train = tidali.make_loader(data, "train", batch_size=160, device="cpu")
    (images, first), (_, second) = next(iter(train)), next(iter(train))
    assert not torch.equal(first, second)  # shuffled anew each epoch
    # By the data set's own mean and standard deviation, which are of these very images.
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(images.std((0, 2, 3)), torch.ones(3), atol=1e-3)


@pytest.mark.parametrize("cache", ["device", "off"])
def test_loader_resumes(demo_data: Path, cache: Any) -> None:
    if cache == "off":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")

    def make() -> Any:
        return tidali.make_loader(
            str(demo_data), "train", res=32, batch_size=32, cache=cache, device="cpu", augment=Augment(flip="random"), seed=7
        )

    loader, again = make(), make()
    batches = iter(loader)
    next(batches)
    next(batches)
    state = loader.state_dict()
    rest = [images.clone() for images, _ in batches]
    again.load_state_dict(state)
    resumed = [images.clone() for images, _ in again]
    assert len(rest) == len(loader) - 2 == 3
    assert all(torch.equal(a, b) for a, b in zip(rest, resumed, strict=True))


def test_loader_shares_between_ranks(demo_data: Path) -> None:
    data = tidali.open_data(str(demo_data))
    parts = [
        torch.cat([labels for _, labels in tidali.make_loader(data, "val", batch_size=5, device="cpu", rank=r, world_size=3)])
        for r in range(3)
    ]
    assert torch.equal(torch.cat(parts).bincount(minlength=4), torch.tensor(data.split("val").class_counts))


def test_what_cannot_be_right(demo_data: Path) -> None:
    for wrong in ({"res": 16}, {"batch_size": 161}, {"rank": 1}, {"world_size": 2}):
        with pytest.raises(UsageError):
            tidali.make_loader(str(demo_data), "train", device="cpu", **wrong)
    with pytest.raises(tidali.TidaliError, match="no 'nonsense' split"):
        tidali.make_loader(str(demo_data), "nonsense", device="cpu")
