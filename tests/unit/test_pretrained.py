"""Starting weights: torchvision's own mechanism over a loopback server, its hash checked, and files in its place."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models import ResNet18_Weights

from tidali.config import IMAGENET_MEAN, IMAGENET_STD
from tidali.errors import TidaliError
from tidali.model.pretrained import apply_init, file_weights, imagenet_weights, imagenet_weights_path
from tidali.model.resnet import build_resnet18


@pytest.fixture(scope="module")
def stock_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of torchvision's ResNet-18 for 1,000 classes, named as torchvision names its files: by its hash."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("served")
    torch.save(torchvision.models.resnet18().state_dict(), folder / "x")
    digest = hashlib.sha256((folder / "x").read_bytes()).hexdigest()
    return (folder / "x").rename(folder / f"resnet18-{digest[:8]}.pth")


@pytest.fixture
def server(stock_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The file's folder over HTTP on this machine, with an empty weights cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = partial(SimpleHTTPRequestHandler, directory=str(stock_file.parent))
    handler.log_message = lambda *args: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()


def point_to(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", url)


def test_download_with_the_right_hash(server: str, stock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(monkeypatch, f"{server}/{stock_file.name}")
    model = build_resnet18(5, "imagenet")
    report, normalisation = apply_init(model, "imagenet")
    assert normalisation == (IMAGENET_MEAN, IMAGENET_STD)
    assert report is not None
    assert set(report.fresh) == {"fc.weight", "fc.bias"}
    expected = torch.load(stock_file, weights_only=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items() if name in report.loaded)
    assert imagenet_weights_path().read_bytes() == stock_file.read_bytes()
    point_to(monkeypatch, f"http://127.0.0.1:9/{stock_file.name}")  # nobody listens there: the second time it is not asked
    assert imagenet_weights().keys() == expected.keys()


def test_download_with_a_wrong_hash_is_refused_and_not_kept(
    server: str, stock_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = stock_file.with_name("resnet18-0123abcd.pth")
    wrong.write_bytes(stock_file.read_bytes())
    point_to(monkeypatch, f"{server}/{wrong.name}")
    with pytest.raises(TidaliError, match=r"--init imagenet: .*invalid hash value.*0123abcd") as refused:
        imagenet_weights()
    assert "\n" not in str(refused.value)
    assert not imagenet_weights_path().exists()


def test_offline_it_says_where_to_put_the_file(server: str, stock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(monkeypatch, f"http://127.0.0.1:9/{stock_file.name}")
    with pytest.raises(TidaliError) as refused:
        imagenet_weights()
    assert f"put http://127.0.0.1:9/{stock_file.name} at {imagenet_weights_path()}, or give --init PATH" in str(refused.value)
    imagenet_weights_path().parent.mkdir(parents=True, exist_ok=True)
    imagenet_weights_path().write_bytes(stock_file.read_bytes())
    assert len(imagenet_weights()) == 122


@pytest.mark.parametrize("content", [b"", b"not weights", None])
def test_a_file_put_there_by_hand_is_checked(
    server: str, stock_file: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    """Empty, garbage, and whole weights that are not those of the name."""
    point_to(monkeypatch, "http://127.0.0.1:9/resnet18-0123abcd.pth")
    imagenet_weights_path().parent.mkdir(parents=True)
    imagenet_weights_path().write_bytes(stock_file.read_bytes() if content is None else content)
    with pytest.raises(TidaliError) as refused:
        imagenet_weights()
    assert str(refused.value).startswith(f"--init imagenet: {imagenet_weights_path()} is damaged")
    assert "\n" not in str(refused.value)


def test_a_file_with_a_head_of_a_thousand_classes_is_taken_for_imagenets(stock_file: Path, tmp_path: Path) -> None:
    assert file_weights(str(stock_file)).normalisation == (IMAGENET_MEAN, IMAGENET_STD)
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), tmp_path / "other.pth")
    assert file_weights(str(tmp_path / "other.pth")).normalisation is None
