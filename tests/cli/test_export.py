"""``tidali export``: files that other programs run, and that agree with what evaluation computes."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from tidali import load_model, make_loader, open_data
from tidali.cli.model import parse_input_size
from tidali.dataset.contract import ClassName
from tidali.doctor import parity
from tidali.errors import UsageError
from tidali.hardware.device import plan_device
from tidali.model import export, export_inputs, served
from tidali.model.checkpoint import ModelCard, load_checkpoint, save_checkpoint
from tidali.model.export_inputs import photographs, synthetic
from tidali.model.predict import Classifier
from tidali.model.resnet import build_resnet18

SAME = 1e-5
"""Between probabilities in float32 by another order of sums: 2e-6 was the most seen, on 500 photographs."""

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="tidali[export] is not installed",
)


@pytest.fixture(scope="module")
def pictures(demo_data: Path) -> np.ndarray:
    """All 32 val images, (N, 64, 64, 3) uint8, in stored order."""
    return photographs(open_data(str(demo_data)), "val", (64, 64))


@pytest.fixture(scope="module")
def expected(trained: tuple[Path, Any], demo_data: Path) -> np.ndarray:
    """Probabilities of the val images by evaluation's own loader."""
    model = load_model(trained[0], device="cpu", amp="off")
    card = model.card
    batches = make_loader(str(demo_data), "val", res=card.res, mean=card.mean, std=card.std, device="cpu")
    with torch.inference_mode():
        return torch.cat([model.model(images).softmax(1) for images, _ in batches]).numpy()


@pytest.fixture(scope="module")
def onnx_file(tidali: Any, trained: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An ONNX file by its default settings, and how the command ended."""
    path = tmp_path_factory.mktemp("export") / "x.onnx"
    ended = tidali("export", trained[0], "-o", path, "--json")
    assert (ended.code, ended.stderr) == (0, "")
    return path, json.loads(ended.stdout)


@needs_onnx
def test_onnx(onnx_file, demo_data: Path, pictures: np.ndarray, expected: np.ndarray) -> None:
    import onnx
    import onnxruntime

    path, report = onnx_file
    assert report["checked_on"] == f"32 images of val of {demo_data}"
    assert (report["images"], report["same_top1"], report["input_height"], report["size_bytes"]) == (
        *(32, 32, 64),
        path.stat().st_size,
    )
    assert report["largest_difference"] < SAME
    assert list(path.parent.iterdir()) == [path]

    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given_,), (gives,) = session.get_inputs(), session.get_outputs()
    assert (given_.name, given_.type, given_.shape[1:]) == ("images", "tensor(uint8)", [64, 64, 3])
    assert (gives.name, gives.type, gives.shape[1:]) == ("probabilities", "tensor(float)", [4])
    assert isinstance(given_.shape[0], str)  # any number
    for count in (1, 5, 32):
        (found,) = session.run(None, {"images": pictures[:count]})
        assert np.abs(found - expected[:count]).max() < SAME
        assert (found.argmax(1) == expected[:count].argmax(1)).all()

    card = json.loads(session.get_modelmeta().custom_metadata_map["tidali"])
    classes = open_data(str(demo_data)).manifest.classes
    assert [(one["id"], one["name"]) for one in card["classes"]] == [(one.id, one.name) for one in classes]
    assert (card["res"], card["kernel"], card["input"]["layout"]) == (32, "pil", "NHWC")
    assert b"site-packages" not in path.read_bytes()  # no paths of the machine that wrote it
    with pytest.raises(UsageError, match=r"x\.onnx: .*an ONNX model; give the checkpoint that it was exported from"):
        load_model(path)


def test_pt2(tidali, trained, pictures: np.ndarray, expected: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    ended = tidali("export", trained[0], "-o", path)  # the format by the suffix
    assert (ended.code, ended.stderr) == (0, "")
    assert "32 of 32" in ended.stdout
    extra = {"tidali.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    for count in (1, 5, 32):
        found = program(torch.from_numpy(pictures[:count])).numpy(force=True)
        assert np.abs(found - expected[:count]).max() < SAME
        assert (found.argmax(1) == expected[:count].argmax(1)).all()
    assert json.loads(extra["tidali.json"])["res"] == 32
    with pytest.raises(UsageError, match=r"x\.pt2: .*a program that torch\.export wrote; give the checkpoint"):
        load_model(path)
    assert b"site-packages" not in path.read_bytes()


@needs_onnx
def test_example_serves_with_onnxruntime_alone(onnx_file, trained, pictures: np.ndarray, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(pictures[0]).save(tmp_path / "stored.png")
    Image.fromarray(pictures[1]).resize((200, 128)).save(tmp_path / "large.png")
    example = Path(__file__).parents[2] / "examples/serve_onnx.py"
    program = (
        f"import runpy, sys; sys.argv = ['serve', {str(onnx_file[0])!r}, 'stored.png', 'large.png']; "
        f"runpy.run_path({str(example)!r}); assert not {{'torch', 'tidali'}} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    (best, *_), _ = load_model(trained[0], device="cpu", amp="off").predict(pictures[:2])
    first, second = done.stdout.splitlines()
    assert first == f"stored.png: {best.name} ({best.probability:.1%})"
    assert second.startswith("large.png: ")


class FakeRuntime:
    """onnxruntime as the example uses it; the model is torch's."""

    SessionOptions = SimpleNamespace

    def __init__(self, model: Classifier, size: tuple[int, int]) -> None:
        self.model, self.size = model, size
        self.served = served.ServedModel(model.model, model.card, size)

    def set_default_logger_severity(self, level: int) -> None:
        pass

    def InferenceSession(self, path: str, options: Any, providers: list[str]) -> FakeRuntime:
        assert options.intra_op_num_threads >= 1  # or it pins threads to cores that a container may lack, and says so
        return self

    def get_modelmeta(self) -> SimpleNamespace:
        return SimpleNamespace(custom_metadata_map={"tidali": json.dumps(export.describe(self.model.card, self.size))})

    def run(self, outputs: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert feed["images"].shape[1:] == (*self.size, 3)
        assert feed["images"].dtype == np.uint8
        with torch.inference_mode():
            return [self.served(torch.from_numpy(feed["images"])).numpy()]


def serve(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime, *paths: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", ["serve", "x.onnx", *map(str, paths)])
    runpy.run_path(str(Path(__file__).parents[2] / "examples/serve_onnx.py"))


@pytest.mark.parametrize(
    ("res", "crop_fraction", "kernel", "size"),
    [
        (32, 1.0, "pil", (64, 64)),
        (64, 0.875, "pil", (73, 73)),
        (48, 1.0, "opencv", (64, 48)),
    ],
)
def test_the_example_prepares_images_as_predict_does(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path, res: int, crop_fraction: float, kernel: str, size: tuple[int, int]
) -> None:
    from PIL import Image

    torch.manual_seed(1)
    model = _classifier(build_resnet18(5, "imagenet"), res=res, crop_fraction=crop_fraction, kernel=kernel)
    paths = []
    pixels = parity.photographs(4, 300).numpy()
    for number, (height, width) in enumerate([(300, 260), (128, 200), (40, 30), size]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels[number, :height, :width]).save(paths[-1])
    serve(monkeypatch, FakeRuntime(model, size), *paths)
    printed = capsys.readouterr().out.splitlines()
    for path, line, (best, *_) in zip(paths, printed, model.predict(paths), strict=True):
        name, percent = re.fullmatch(rf"{path}: (\w+) \((.*)%\)", line).groups()  # type: ignore[union-attr]
        assert name == best.name
        assert abs(float(percent) - 100 * best.probability) < 0.1 + 0.05  # points; printed with one digit


def test_the_example_refuses_what_an_input_cannot_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (100, 80)).save(tmp_path / "x.png")
    model = _classifier(_tiny(), res=64, crop_fraction=0.875)
    with pytest.raises(SystemExit, match=r"x\.png: .* --input-size 73"):
        serve(monkeypatch, FakeRuntime(model, (64, 64)), tmp_path / "x.png")


def _classifier(network: nn.Module, **changes: Any) -> Classifier:
    classes = tuple(ClassName(id=str(number), name=str(number)) for number in range(5))
    card = ModelCard(classes=classes, stem="imagenet", stem_bias=False, res=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    return Classifier(network, replace(card, **changes), plan_device("cpu", "off", "off"))


@given(st.integers(1, 80), st.integers(1, 80), st.integers(32, 48), st.sampled_from(["pil", "opencv"]))
@examples(max_examples=40)
def test_resize_in_the_graph_is_the_loaders(height: int, width: int, res: int, kernel: Any) -> None:
    """A network that shows every pixel, so that nothing hides."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * res * res, 5))
    model = _classifier(network, res=res, kernel=kernel)
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    seen: list[torch.Tensor] = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    whole = served.ServedModel(network, model.card, (height, width))
    whole(torch.from_numpy(images))
    model.logits(images)
    assert torch.allclose(*seen, atol=2e-5)  # normalised pixels, up to 3, in float32


def _tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["normalisation", "kernel", "weights"])
def test_a_wrong_file_is_not_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str) -> None:
    model, path = _classifier(_tiny()), tmp_path / "x.pt2"
    path.write_bytes(b"old")
    check_on = np.random.default_rng(0).integers(0, 256, (8, 20, 20, 3), np.uint8)
    if fault == "normalisation":
        right = served.make_affine
        monkeypatch.setattr(served, "make_affine", lambda mean, std, device: right(mean[::-1], std, device))
    elif fault == "kernel":
        right = served.bicubic_taps
        monkeypatch.setattr(served, "bicubic_taps", lambda *a, kernel, **k: right(*a, kernel="opencv", **k))
    else:
        right = export.to_pt2
        wrong = served.ServedModel(_tiny(1), model.card, (20, 20))
        monkeypatch.setattr(export, "to_pt2", lambda _, *rest: right(wrong, *rest))
    with pytest.raises(export.TidaliError, match=r"x\.pt2: not written, its probabilities differ .* by up to"):
        export.export_model(model, path, "pt2", (20, 20), check_on)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]

    monkeypatch.undo()
    agreement = export.export_model(model, path, "pt2", (20, 20), check_on)
    assert agreement.same_top1 == 8
    run, metadata = export.open_pt2(path.read_bytes())
    assert json.loads(metadata)["mean"] == [0.4, 0.5, 0.6]
    assert np.abs(run(check_on[:1]) - model.logits(check_on[:1]).softmax(1).numpy()).max() < SAME


def test_memory_that_runs_out_names_the_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(images: np.ndarray) -> np.ndarray:
        raise Exception("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 9")

    model, size = _classifier(_tiny()), (20, 30)
    monkeypatch.setattr(export, "to_pt2", lambda *_: b"")
    monkeypatch.setattr(export, "open_pt2", lambda _: (run, json.dumps(export.describe(model.card, size))))
    with pytest.raises(export.TidaliError, match=r"^batches of 64 images of \(20, 30\) px do not fit .*smaller --input-size"):
        export.export_model(model, tmp_path / "x.pt2", "pt2", size, synthetic(size))
    assert list(tmp_path.iterdir()) == []


class ForeignError(Exception):
    """Of another package: its class, and what it derives from, say nothing."""


def _fails(*_: Any, **__: Any) -> Any:
    try:
        raise ForeignError("functions are not supported.\nSee above")
    except ForeignError as error:
        raise RuntimeError("step 2 of 3 failed") from error


@needs_onnx
@pytest.mark.parametrize("failing", ["torch.onnx.export", "onnxruntime.InferenceSession"])
def test_packages_that_fail_are_named(tidali, trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str) -> None:
    monkeypatch.setattr(export, "to_onnx", export.to_onnx if failing.startswith("torch") else lambda *_: b"")
    monkeypatch.setattr(failing, _fails)
    ended = tidali("export", trained[0], "-o", tmp_path / "x.onnx")
    assert (ended.code, ended.stdout) == (1, "")
    installed = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime"))
    assert ended.stderr == (
        f"tidali: {tmp_path}/x.onnx: not written, the export failed (ForeignError: functions are not supported.) with "
        f"{installed}; pip install --upgrade onnx onnx_ir onnxscript onnxruntime, or try --format pt2\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["torch.export.export", "torch.export.save", "torch.export.load"])
def test_torch_export_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str) -> None:
    monkeypatch.setattr(export, "to_pt2", export.to_pt2 if failing != "torch.export.load" else lambda *_: b"")
    monkeypatch.setattr(failing, _fails)
    with pytest.raises(export.TidaliError) as raised:
        export.export_model(_classifier(_tiny()), tmp_path / "x.pt2", "pt2", (20, 20), synthetic((20, 20)))
    assert raised.value.exit_code == 1
    assert str(raised.value) == (
        f"{tmp_path}/x.pt2: not written, the export failed (ForeignError: functions are not supported.) with "
        f"torch {version('torch')}, torchvision {version('torchvision')}; "
        "pip install --upgrade torch torchvision, or try --format onnx"
    )
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_is_named(tidali, trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else found(name, *a))
    ended = tidali("export", trained[0], "-o", tmp_path / "x.onnx")
    assert (ended.code, ended.stdout) == (1, "")
    assert ended.stderr == "tidali: --format onnx needs onnxscript: pip install 'tidali[export]'; --format pt2 does not\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def orphan(trained: tuple[Path, Any], tmp_path: Path) -> Path:
    """A checkpoint whose data set is not here."""
    card, _ = load_checkpoint(trained[0] / "best.safetensors")
    model = load_model(trained[0], device="cpu", amp="off").model
    save_checkpoint(tmp_path / "x.safetensors", model, replace(card, settings={**card.settings, "data": "nowhere"}))
    return tmp_path / "x.safetensors"


def test_input_size_without_the_data(tidali, orphan: Path) -> None:
    ended = tidali("export", orphan, "--format", "pt2")
    assert (ended.code, ended.stdout) == (2, "")
    assert "trained on (nowhere) is not here" in ended.stderr
    assert "--input-size such as 32" in ended.stderr
    ended = tidali("export", orphan, "--format", "pt2", "--input-size", "48x40", "--json")
    report = json.loads(ended.stdout)
    assert (report["checked_on"], report["images"]) == ("64 random images", 64)
    assert (report["input_height"], report["input_width"]) == (48, 40)
    assert report["path"] == str(orphan.with_suffix(".pt2"))
    run, _ = export.open_pt2(orphan.with_suffix(".pt2").read_bytes())
    assert run(np.zeros((3, 48, 40, 3), np.uint8)).shape == (3, 4)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--input-size", "64x64x3"], "--input-size 64x64x3"),
        (["--input-size", "0"], "--input-size 0"),
        (["--format", "tflite"], "--format"),
        (["-o", "nowhere/x.pt2"], "there is no folder nowhere"),
        (["-o", "."], "--out .: is a folder"),
        (["--format", "pt2", "--data", "nowhere"], "nowhere: no dataset.json here"),
    ],
)
def test_wrong_use(tidali, trained, monkeypatch, tmp_path: Path, argv: list[str], complaint: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *a: object())  # onnx or not, these are found first
    ended = tidali("export", trained[0], *argv)
    assert (ended.code, ended.stdout) == (2, "")
    assert complaint in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_input_sizes_are_parsed() -> None:
    assert (parse_input_size("64"), parse_input_size("48x64")) == ((64, 64), (48, 64))
    with pytest.raises(UsageError):
        parse_input_size("x")


def test_images_to_check_on(demo_data: Path) -> None:
    data = open_data(str(demo_data))
    few = photographs(data, "val", (64, 64), 4)
    every = photographs(data, "val", (64, 64))
    assert np.array_equal(few, every[::8])  # from all over the split
    assert photographs(data, "val", (30, 50), 4).shape == (4, 30, 50, 3)
    assert synthetic((20, 30)).shape == (64, 20, 30, 3)
    assert np.ptp(synthetic((20, 30))) == 255


def test_large_images_to_check_on_are_fewer(demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 images of 4,096 px would take 25 GB."""
    monkeypatch.setattr(export_inputs, "_MOST_PIXELS", 3 * 20 * 30)
    monkeypatch.setattr(export, "_BATCH_PIXELS", 2 * 20 * 30)
    data = open_data(str(demo_data))
    for images in (synthetic((20, 30)), photographs(data, "val", (20, 30))):
        assert images.shape == (3, 20, 30, 3)
        sizes: list[int] = []
        model = _classifier(_tiny())

        def run(batch: np.ndarray, sizes: list[int] = sizes, model: Classifier = model) -> np.ndarray:
            sizes.append(len(batch))
            return model.logits(batch).softmax(1).numpy()

        assert export.compare(run, model, images).images == 3
        assert sizes == [2, 1, 1]  # the last is of an image alone
    assert photographs(data, "val", (40, 50)).shape == synthetic((40, 50)).shape == (1, 40, 50, 3)
