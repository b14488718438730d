"""The model, and what is loaded into it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
import torchvision
from torch import nn

from tidali.config import IMAGENET_MEAN, IMAGENET_STD, Arch, Stem
from tidali.errors import UsageError
from tidali.hardware.cpu_pooling import pool_before_relu
from tidali.model.resnet import (
    ARCHITECTURES,
    build_resnet,
    build_resnet18,
    forward_gmacs,
    load_matching,
    shrink_kernels,
    training_activations,
)

ARCHS = get_args(Arch)


def drawn_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Random weights for a model on the device ``meta``; torchvision's own initialisation of 60 million takes seconds."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, tensor in model.state_dict().items():
        fan_in = tensor[0].numel() if tensor.ndim else 1
        uniform = torch.empty(tensor.shape, dtype=tensor.dtype)
        if tensor.ndim == 4:
            uniform.uniform_(-((6 / fan_in) ** 0.5), (6 / fan_in) ** 0.5, generator=generator)
        else:
            uniform.fill_(1 if name.endswith(("weight", "var")) and tensor.ndim == 1 else 0)
        state[name] = uniform
    state["fc.weight"].uniform_(-0.1, 0.1, generator=generator)
    return state


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_is_torchvisions(arch: Arch) -> None:
    """What it computes, on the same weights; its parameters and counted multiply-adds against torchvision's documentation; and
    the file, the hash and the normalisation of its ImageNet weights."""
    with torch.device("meta"):
        ours, theirs = build_resnet(arch, 1000, "imagenet"), torchvision.models.get_model(arch)
    one, weights = ARCHITECTURES[arch], torchvision.models.get_model_weights(arch).IMAGENET1K_V1
    gmacs, count = forward_gmacs(ours, (1, 3, 224, 224)), sum(parameter.numel() for parameter in ours.parameters())
    assert gmacs == pytest.approx(weights.meta["_ops"], abs=0.0005)  # it has three digits
    assert count == weights.meta["num_params"]
    documented = f"| `{arch}` | {one.title} | `{one.weights_file}` | {count / 1e6:.1f} | {gmacs:.3f} |\n"
    assert documented in (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert weights.url.endswith(f"/{arch}-{one.weights_sha256}.pth")
    assert one.weights_file == f"{arch}-{one.weights_sha256}.pth"
    assert len(one.weights_sha256) == 8
    assert one.normalisation == (IMAGENET_MEAN, IMAGENET_STD)
    computes_the_same(ours, theirs, drawn_state(theirs))


@pytest.mark.parametrize("arch", ["resnet34", "resnet50", "resnext50_32x4d"])
def test_the_small_stem_is_torchvisions_network_with_another_first_layer(arch: Arch) -> None:
    with torch.device("meta"):
        ours, theirs = build_resnet(arch, 5, "small"), torchvision.models.get_model(arch, num_classes=5)
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    computes_the_same(ours, theirs, drawn_state(theirs))


def computes_the_same(ours: nn.Module, theirs: nn.Module, state: dict[str, torch.Tensor]) -> None:
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for model in (ours, theirs):
        model.load_state_dict(state, assign=True)
    with torch.inference_mode():
        logits, expected = ours.eval()(images), theirs.eval()(images)
    assert torch.equal(logits, expected)
    assert logits.std() > 1e-3


@pytest.mark.parametrize(("given", "wanted"), [("resnet34", "resnet18"), ("resnet18", "resnet34")])
def test_weights_of_another_architecture_are_recognised(given: Arch, wanted: Arch) -> None:
    with torch.device("meta"):
        source, model = (build_resnet(arch, 5, "imagenet") for arch in (given, wanted))
    weights = {name: torch.zeros((), dtype=one.dtype).expand(one.shape) for name, one in source.state_dict().items()}
    with pytest.raises(UsageError, match=rf"^file: the weights are those of a {ARCHITECTURES[given].title}; .*--arch {given}"):
        load_matching(model, weights, "file", arch=wanted)


@pytest.mark.parametrize("res", [32, 64])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_logits_have_a_column_a_class(stem: str, res: int) -> None:
    model = build_resnet18(7, stem).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, res, res)).shape == (2, 7)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 16), ("small", 64)])
def test_stem_decides_the_side_of_the_feature_maps(stem: str, side: int) -> None:
    model, seen = build_resnet18(2, stem), []
    model.layer1.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    with torch.inference_mode():
        model(torch.zeros(2, 3, 64, 64))
    assert seen == [(2, 64, side, side)]


def test_imagenet_stem_is_torchvisions_model() -> None:
    torch.manual_seed(3)
    ours = build_resnet18(10, "imagenet").state_dict()
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(num_classes=10).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_before_the_relu_changes_no_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    plain = torchvision.models.resnet18(num_classes=5)
    ours = build_resnet18(5, "imagenet")
    ours.load_state_dict(plain.state_dict())
    pool_before_relu(ours)
    relus = []
    ours.maxpool[1].register_forward_hook(lambda module, inputs, output: relus.append(tuple(output.shape)))
    images, labels = torch.randn(6, 3, 48, 48), torch.randint(5, (6,))
    images[0] = 0.0  # channels of one value throughout: ties in every window
    found = []
    for model in (plain, ours):
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            logits = model(images)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        found.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    assert relus == [(6, 64, 12, 12)]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_nothing_is_pooled_before_the_relu_of_the_small_stem() -> None:
    model = build_resnet18(5, "small")
    pool_before_relu(model)
    assert isinstance(model.relu, torch.nn.ReLU)


def test_stem_bias_is_for_the_small_stem() -> None:
    assert build_resnet18(2, "small").conv1.bias is None
    assert build_resnet18(2, "small", stem_bias=True).conv1.bias.shape == (64,)


def test_every_tensor_of_an_equal_model_is_loaded() -> None:
    source, model = build_resnet18(5, "imagenet").state_dict(), build_resnet18(5, "imagenet")
    report = load_matching(model, source, "file")
    assert (set(report.loaded), report.fresh, report.unused) == (set(source), {}, ())
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())
    assert report.lines() == [f"loaded {len(source)} of {len(source)} tensors"]


def test_another_head_and_stem_stay_fresh_and_are_listed() -> None:
    source = build_resnet18(1000, "imagenet").state_dict()
    model = build_resnet18(5, "small", stem_bias=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_matching(model, {**source, "ema.decay": torch.ones(1)}, "file")
    assert report.fresh == {
        "conv1.weight": "(64, 3, 7, 7) in the file, (64, 3, 3, 3) in this model",
        "conv1.bias": "not in the file",
        "fc.weight": "(1000, 512) in the file, (5, 512) in this model",
        "fc.bias": "(1000,) in the file, (5,) in this model",
    }
    assert report.unused == ("ema.decay",)
    after = model.state_dict()
    assert set(report.loaded) == after.keys() - report.fresh.keys()
    assert all(torch.equal(after[name], source[name]) for name in report.loaded)
    assert all(torch.equal(after[name], before[name]) for name in report.fresh)
    assert report.lines() == [
        f"loaded {len(source) - 3} of {len(source) + 1} tensors",
        *(f"not loaded: {name} ({reason})" for name, reason in report.fresh.items()),
        "unused: ema.decay",
    ]


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"encoder.weight": torch.zeros(3)},
        {"fc.weight": torch.zeros(5, 512)},  # a head alone, of any network with 512 features
    ],
    ids=["empty", "another network", "a head"],
)
def test_what_is_no_resnet18_is_refused(weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UsageError, match=r"^file: .*bn1\.weight is not in the file"):
        load_matching(build_resnet18(5, "imagenet"), weights, "file")


def test_shrunk_kernels_answer_as_the_large_ones_do_to_the_enlarged_patch() -> None:
    generator = torch.Generator().manual_seed(0)
    kernels, patch = torch.randn(64, 3, 7, 7, generator=generator), torch.randn(1, 3, 3, 3, generator=generator)
    enlarged = torch.nn.functional.interpolate(patch, size=(7, 7), mode="bilinear")
    expected = torch.nn.functional.conv2d(enlarged, kernels).flatten()
    found = torch.nn.functional.conv2d(patch, shrink_kernels(kernels, 3)).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # sums of 147 float32 products


def test_the_stem_is_resampled_where_that_is_asked_for() -> None:
    source = torchvision.models.resnet18(num_classes=5).state_dict()
    model = build_resnet18(5, "small")
    report = load_matching(model, source, "file", stem_init="resample")
    assert report.resampled == ("conv1.weight",)
    assert report.fresh == {}
    assert "resampled: conv1.weight" in report.lines()
    assert torch.equal(model.conv1.weight, shrink_kernels(source["conv1.weight"], 3))
    # A constant image is answered the same: a kernel's sum stays.
    torch.testing.assert_close(model.conv1.weight.sum((2, 3)), source["conv1.weight"].sum((2, 3)), rtol=1e-4, atol=1e-5)
    stock = build_resnet18(5, "imagenet")
    assert load_matching(stock, source, "file", stem_init="resample").resampled == ()
    assert torch.equal(stock.conv1.weight, source["conv1.weight"])


@pytest.mark.parametrize(("stem", "res"), [("imagenet", 64), ("imagenet", 224), ("small", 64)])
def test_activations_are_the_outputs_of_the_layers(stem: Stem, res: int) -> None:
    """Counted by hand from ResNet-18's table: the output of each convolution, and of each batch norm or ReLU after it."""
    stages = [(64, 4 * 2), (128, 5 * 2), (256, 5 * 2), (512, 5 * 2)]  # channels; convolutions, the shortcut's too, times two
    side = res // 4 if stem == "imagenet" else res
    expected = 2 * 64 * (res // 2) ** 2 + 64 * side**2 if stem == "imagenet" else 2 * 64 * side**2
    expected += sum(maps * channels * (side >> stage) ** 2 for stage, (channels, maps) in enumerate(stages))
    model = build_resnet18(10, stem).eval()
    found = training_activations(model, res)
    assert found == pytest.approx(expected, rel=0.1)  # this counts the shortcuts' sums twice, and leaves out the input
    model.requires_grad_(False)
    assert training_activations(model, res) == 0
    assert not model.training
    assert model.bn1.num_batches_tracked == 0
