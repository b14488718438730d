"""The model, and what is loaded into it."""

from __future__ import annotations

import pytest
import torch
import torchvision

from tidali.config import Stem
from tidali.errors import UsageError
from tidali.hardware.cpu_pooling import pool_before_relu
from tidali.model.resnet import build_resnet18, load_matching, resnet18_activations, shrink_kernels


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
def test_activations_are_what_autograd_keeps(stem: Stem, res: int) -> None:
    """Counted by the tensors that a training step saves, each memory once, without weights."""
    model = build_resnet18(10, stem).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *model.buffers())}
    images, kept = torch.randn(2, 3, res, res), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() // 4, tensor  # alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images).sum()
    found = sum(elements for elements, _ in kept.values()) / len(images)
    assert found == pytest.approx(resnet18_activations(stem, res), rel=0.1)  # the estimate counts the shortcuts' sums twice
