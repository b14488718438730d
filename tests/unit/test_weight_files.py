"""Files of weights as other programs write them: loaded whole, or refused in a line that names the file and what is wrong.

Each tensor of these files is one number, expanded to the tensor's shape, so that a file is small and every place in the model
tells which tensor was loaded into it."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import pathlib
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from tidali.dataset.contract import ClassName
from tidali.errors import UsageError
from tidali.model.checkpoint import ModelCard, find_checkpoint, load_model, save_checkpoint
from tidali.model.pretrained import apply_init, file_weights
from tidali.model.resnet import LoadReport, build_resnet18

CLASSES = tuple(ClassName(id=name, name=name) for name in ("ant", "bee", "cat", "dog", "elk"))


def numbered(build: Callable[..., nn.Module], first: int = 0) -> dict[str, Tensor]:
    with torch.device("meta"):
        state = build(num_classes=5).state_dict()
    return {
        name: torch.tensor(first + number).to(tensor.dtype).expand(tensor.shape)
        for number, (name, tensor) in enumerate(state.items())
    }


STATE, OTHER = numbered(torchvision.models.resnet18), numbered(torchvision.models.resnet18, 1000)
DEEPER, WIDER = numbered(torchvision.models.resnet34), numbered(torchvision.models.resnet50)
BODY = {name: tensor for name, tensor in STATE.items() if not name.startswith("fc.")}


def under(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Any]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def cast(dtype: torch.dtype, which: Callable[[Tensor], bool] = Tensor.is_floating_point) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if which(tensor) else tensor for name, tensor in STATE.items()}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_resnet18(5, "imagenet")


@pytest.fixture(scope="module")
def small_model() -> nn.Module:
    return build_resnet18(5, "small")


def init(model: nn.Module, path: Path, document: object, **options: Any) -> LoadReport:
    torch.save(document, path, **options)
    report, _ = apply_init(model, str(path), classes=CLASSES)
    assert report is not None
    return report


def check_values(model: nn.Module, *, fresh: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    for name, tensor in model.state_dict().items():
        if name not in fresh:
            assert torch.equal(tensor, STATE[name]), name


# ------------------------------------------------------------------------------------------------- wherever they are in a file


@pytest.mark.parametrize(
    "document",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{}]}},
        {"model": STATE},
        {"model_state_dict": STATE, "lr": 0.1},
        {"net": STATE},
        {"ema": STATE},
        {"model": {"state_dict": STATE}},
        under("module."),
        under("_orig_mod."),
        under("module._orig_mod."),
        under("model.backbone."),
        {"state_dict": under("module.")},
        {"state_dict": under("model."), "hyper_parameters": {"lr": 0.1}, "loops": {}},
        {"state_dict": under("net.")},
        {name: nn.Parameter(tensor, tensor.is_floating_point()) for name, tensor in under("w.").items() if tensor.ndim},
    ],
    ids=[
        *("plain", "state_dict", "model", "model_state_dict", "net", "ema", "nested", "DataParallel", "compiled", "both"),
        *("backbone", "DataParallel in state_dict", "Lightning", "Lightning, net", "parameters"),
    ],
)
def test_a_state_dict_is_found_wherever_it_is(model: nn.Module, tmp_path: Path, document: object) -> None:
    report = init(model, tmp_path / "x.pth.tar", document)
    assert len(report.loaded) == len(STATE)
    assert (report.fresh, report.unused) == ({}, ())
    without_counts = {name for name, tensor in STATE.items() if not tensor.ndim} if "w.fc.bias" in dict(document) else set()
    check_values(model, fresh=without_counts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_another_precision(model: nn.Module, tmp_path: Path, dtype: torch.dtype) -> None:
    init(model, tmp_path / "x.ckpt", cast(dtype))
    check_values(model)  # numbers up to 121 are exact in 8 bits


def test_files_of_old_pytorch(model: nn.Module, tmp_path: Path) -> None:
    init(model, tmp_path / "x.bin", STATE, _use_new_zipfile_serialization=False)
    check_values(model)
    lacking = {name: tensor for name, tensor in STATE.items() if not name.endswith("num_batches_tracked")}
    assert init(model, tmp_path / "x.bin", lacking).fresh == {}


def test_what_is_beside_the_weights_is_listed(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    assert init(model, path, {"n_averaged": torch.tensor(3), **under("module.")}).unused == ("n_averaged",)
    assert init(model, path, {**STATE, "epoch": 3}).unused == ("epoch",)
    assert init(model, path, {"model": STATE, "model_ema": OTHER}).unused == ("model_ema",)
    check_values(model)  # not those of model_ema
    report = init(model, path, {**under("backbone.", BODY), "classifier.0.weight": torch.zeros(2, 2, 3, 3)})
    assert set(report.fresh) == {"fc.weight", "fc.bias"}
    assert report.unused == ("classifier.0.weight",)
    many = init(model, path, {**STATE, **{f"\x1b[31m{n}": n for n in range(30)}})
    assert len(many.lines()) < 15
    assert "\x1b" not in "".join(many.lines())


@pytest.mark.parametrize("head", ["head.", "fc.1.", "classifier.", "last_linear."])
def test_a_head_of_another_name_stays_fresh(model: nn.Module, tmp_path: Path, head: str) -> None:
    renamed = {name.replace("fc.", head): tensor for name, tensor in STATE.items()}
    report = init(model, tmp_path / "x.pth", renamed)
    assert set(report.fresh) == {"fc.weight", "fc.bias"}
    assert set(report.unused) == {f"{head}weight", f"{head}bias"}


def test_harmless_objects_beside_the_weights(model: nn.Module, tmp_path: Path) -> None:
    scalars = [np.float64(3.5), np.float32(1), np.int64(2), np.bool_(True), np.str_("x")]
    arguments = argparse.Namespace(lr=0.1, nested=argparse.Namespace(best=np.float64(1)))
    path, renamed = tmp_path / "x.pth", tmp_path / "numpy-1.pth"
    init(model, path, {"args": arguments, "scores": scalars, "state_dict": STATE})
    check_values(model)
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert any("multiarray.scalar" in name for name in unknown)  # without our list torch refuses them
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(renamed, "w") as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    report, _ = apply_init(model, str(renamed))
    assert report is not None
    assert len(report.loaded) == len(STATE)


def test_a_safetensors_file_by_any_name(model: nn.Module, tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in under("module.").items()}
    safetensors.torch.save_file(state, tmp_path / "x.bin")
    apply_init(model, str(tmp_path / "x.bin"))
    check_values(model)


# ------------------------------------------------------------------------------------------------------- what does not fit


def refused(model: nn.Module, path: Path, document: object, **options: Any) -> str:
    before = [model.state_dict()[name].clone() for name in ("conv1.weight", "layer1.0.bn1.weight", "fc.bias")]
    with pytest.raises(UsageError) as error:
        init(model, path, document, **options)
    after = [model.state_dict()[name] for name in ("conv1.weight", "layer1.0.bn1.weight", "fc.bias")]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    message = str(error.value)
    assert message.startswith(f"--init {path}: ")
    assert not any(part in message for part in ("\n", "\x1b", "weights_only", "WeightsUnpickler", "add_safe_globals"))
    return message


@pytest.mark.parametrize(
    ("document", "names"),
    [
        (DEEPER, "a ResNet-34; give --arch resnet34"),
        ({"state_dict": under("module.", DEEPER)}, "a ResNet-34; give --arch resnet34"),
        (WIDER, "a ResNet-50; give --arch resnet50"),
        ({name: tensor for name, tensor in STATE.items() if name != "layer2.0.bn1.weight"}, "layer2.0.bn1.weight"),
        ({name: tensor for name, tensor in STATE.items() if name != "conv1.weight"}, "conv1.weight"),
        ({**STATE, "conv1.weight": torch.zeros(64, 1, 7, 7)}, "(64, 1, 7, 7)"),
        ({**STATE, "bn1.weight": torch.zeros(65)}, "(65,)"),
        ({**STATE, "layer1.0.se.fc.weight": torch.zeros(4, 4)}, "layer1.0.se.fc.weight"),
        ({**STATE, "layer5.0.bn1.weight": torch.zeros(4)}, "layer5.0.bn1.weight"),
        ({**STATE, "up.weight": torch.zeros(2, 2, 3, 3)}, "up.weight"),
        (cast(torch.int8, lambda tensor: tensor.ndim == 4), "torch.int8"),
        ({**STATE, "bn1.weight": torch.ones(64, device="meta")}, "bn1.weight"),
        ({**STATE, "bn1.weight": torch.ones(64).to_sparse()}, "bn1.weight"),
        ({**STATE, **under("module.")}, "module.layer1.0.conv1.weight"),
        ({**under("module."), **STATE}, "module.layer1.0.conv1.weight"),
        ({**STATE, "module.fc.bias": torch.zeros(5)}, "module.fc.bias"),
        ({"module.conv1.weight": torch.zeros(64, 3, 7, 7), **STATE}, "module.conv1.weight"),
        ({**under("module."), "fc.bias": torch.zeros(5)}, "module.fc.bias"),
        (under("encoder_q.") | under("encoder_k."), "encoder_k."),
        ({"student": STATE, "teacher": OTHER}, "'student', 'teacher'"),
        ({**STATE, "bn1.running_var": torch.full((64,), float("nan"))}, "bn1.running_var"),
        ({**STATE, "layer3.0.conv1.weight": STATE["layer3.0.conv1.weight"] * float("inf")}, "layer3.0.conv1.weight"),
        ({**STATE, "fc.bias": torch.tensor([0, 0, 0, 0, float("nan")], dtype=torch.float16)}, "fc.bias"),
        ({"epoch": 3, "lr": 0.1, "w": torch.zeros(3)}, "'epoch', 'lr', 'w'"),
        ({"state_dict": {"features.0.weight": torch.zeros(3)}}, "'features.0.weight'"),
        ({"\x1b[31mred\n": torch.zeros(1)}, "red"),
        ({}, "layer1.0.conv1.weight"),
        ([STATE], "list"),
        (torch.zeros(3), "Tensor"),
        (None, "NoneType"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"model": nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear"),
        ({"state_dict": STATE, "path": pathlib.Path("x")}, "pathlib.PosixPath"),
        ({"state_dict": STATE, "when": datetime.date(2020, 1, 1)}, "datetime.date"),
        ({"state_dict": STATE, "call": functools.partial(print)}, "functools.partial"),
    ],
)
def test_what_does_not_fit_is_named(model: nn.Module, tmp_path: Path, document: object, names: str) -> None:
    assert names in refused(model, tmp_path / "x.pth", document)


def test_stems_of_the_other_kind(model: nn.Module, small_model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    small = {**STATE, "conv1.weight": torch.zeros(1).expand(64, 3, 3, 3), "conv1.bias": torch.zeros(64)}
    report = init(model, path, small)
    assert (set(report.fresh), report.unused) == ({"conv1.weight"}, ("conv1.bias",))
    report = init(small_model, path, STATE)
    assert set(report.fresh) == {"conv1.weight"}
    assert set(init(small_model, path, small).fresh) == set()


class _Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_pickle_that_runs_code_is_refused_and_does_not_run(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "trap.pth"
    assert "getattr" in refused(model, path, {**STATE, "x": _Trap(tmp_path / "sprung")})
    assert not (tmp_path / "sprung").exists()
    torch.load(path, weights_only=False)  # the trap is real
    assert (tmp_path / "sprung").exists()


# -------------------------------------------------------------------------------------------------- what is no file of weights


def zip_of(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, "x")

    return write


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "x")


def torchscript(path: Path) -> None:
    zip_of("x/constants.pkl")(path)


def cut(path: Path) -> None:
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-100])


def one_bit(path: Path) -> None:
    """In a tensor, which torch.load reads without a word."""
    torch.save({"x": torch.zeros(100_000, dtype=torch.uint8)}, path)
    content = bytearray(path.read_bytes())
    content[50_000] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["x"].any()


def cut_safetensors(path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def other_protocol(path: Path) -> None:
    torch.save({"x": 3}, path, pickle_protocol=4)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(b"not weights"), "no file of weights"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html><html>"), "web page"),
        (lambda path: path.write_bytes(b"\xef\xbb\xbf\n<html>"), "web page"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git lfs pull"),
        (lambda path: path.write_bytes(b"\x1f\x8b\x08\x00"), "gzip"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "HDF5"),
        (lambda path: path.write_text(json.dumps({"weight_map": {}})), "JSON"),
        (lambda path: path.write_bytes(pickle.dumps(3, protocol=2)), "damaged"),
        (lambda path: path.write_bytes(pickle.dumps({"epoch": 3}, protocol=5)), "protocol"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(40)), "damaged"),
        (zip_of("photo.jpg"), "zip archive without weights"),
        (torchscript, "TorchScript"),
        (tar, "tar archive"),
        (cut, "damaged, or cut off"),
        (one_bit, "damaged"),
        (cut_safetensors, "damaged, or cut off"),
        (other_protocol, "protocol"),
    ],
)
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, write: Callable[[Path], Any], says: str) -> None:
    path = tmp_path / "x.pth"
    write(path)
    with pytest.raises(UsageError) as error:
        file_weights(str(path))
    message = str(error.value)
    assert str(path) in message
    assert says in message
    assert not any(part in message for part in ("\n", "\x1b", "weights_only", "Error"))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--init \S+/none\.pth: no such checkpoint"):
        file_weights(str(tmp_path / "none.pth"))


# ----------------------------------------------------------------------------------------------------- tidali's own checkpoints


CARD = ModelCard(classes=CLASSES, stem="imagenet", stem_bias=False, res=64, mean=(0.1, 0.2, 0.3), std=(1, 1, 1))


def test_a_head_for_other_classes_is_said_to_be_loaded(model: nn.Module, tmp_path: Path) -> None:
    for name, classes in {"same": CLASSES, "other": (*CLASSES[:3], ClassName(id="yak", name="yak"), CLASSES[4])}.items():
        save_checkpoint(tmp_path / f"{name}.safetensors", model, replace(CARD, classes=classes))
    report, normalisation = apply_init(model, str(tmp_path / "same"), classes=CLASSES)
    assert report is not None
    assert report.notes == ()
    assert normalisation == ((0.1, 0.2, 0.3), (1, 1, 1))
    report, _ = apply_init(model, str(tmp_path / "other"), classes=CLASSES)
    assert report is not None
    assert all(part in report.lines()[1] for part in ("head", "'yak'", "'dog'"))
    report = init(model, tmp_path / "x.pth", STATE)
    assert all(part in report.lines()[1] for part in ("head", "5 classes"))
    report = init(model, tmp_path / "x.pth", BODY)
    assert report.notes == ()


def test_the_state_of_a_run_is_no_weights(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "state.safetensors", metadata={"tidali-state": "{}"})
    with pytest.raises(UsageError, match=r"state\.safetensors: .*--resume; .*best or last"):
        file_weights(str(tmp_path / "state.safetensors"))


def test_a_checkpoint_that_is_not_finite_predicts_nothing(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    broken = build_resnet18(5, "imagenet")
    with torch.no_grad():
        broken.layer4[1].bn2.weight[7] = float("nan")
    save_checkpoint(path, broken, CARD)
    message = r"x\.safetensors: weights that are not finite: layer4\.1\.bn2\.weight; take an earlier checkpoint"
    with pytest.raises(UsageError, match=message):
        load_model(path)
    with pytest.raises(UsageError, match=message):
        load_model(path, build_resnet18(5, "imagenet"))
    with pytest.raises(UsageError, match=f"--init .*{message}"):
        apply_init(model, str(path))


def test_a_pytorch_file_is_no_checkpoint_to_evaluate(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"x\.pth: .*a PyTorch file, which can serve as --init only"):
        load_model(find_checkpoint(str(tmp_path / "x.pth")))
