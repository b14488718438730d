from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tidali.hardware.cpu_convolution import MAX_SIDE, as_matrix, kernels_grad, speed_up_tiny_images
from tidali.hardware.device import plan_device
from tidali.model.resnet import build_resnet18
from tidali.recipes import make_recipe
from tidali.training.engine import make_train_state


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 5),
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
)
def test_the_gradient_is_autograds(batch: int, channels: tuple[int, int], height: int, width: int) -> None:
    into, out = channels
    images, grad = (channels_last(batch, count, height, width, dtype=torch.float64) for count in channels)
    kernels = torch.randn(out, into, 3, 3, dtype=torch.float64, requires_grad=True)
    functional.conv2d(images, kernels, padding=1).backward(grad)
    found = kernels_grad(images, grad, torch.float64)
    assert found.is_contiguous(memory_format=torch.channels_last)
    # Sums of up to 125 products of the size of 1 in float64, in another order.
    torch.testing.assert_close(found, kernels.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("height", [1, 2])
@pytest.mark.parametrize("width", [1, 2])
def test_the_matrix_is_the_convolution(height: int, width: int) -> None:
    """Image by image, and no product in it but those that count: of whole numbers, so to the bit."""
    pixels = torch.arange(1.0, 1 + 3 * height * width).view(height, width, 3)
    kernels = torch.arange(1.0, 1 + 4 * 3 * 9).view(4, 3, 3, 3)
    wanted = functional.conv2d(pixels.permute(2, 0, 1)[None], kernels, padding=1)[0].permute(1, 2, 0)
    matrix = as_matrix(kernels, height, width)
    assert matrix.shape == (height * width * 4, height * width * 3)
    assert torch.equal(matrix @ pixels.flatten(), wanted.flatten())


@pytest.mark.parametrize("side", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_gives_what_it_gave(side: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    plain = nn.Conv2d(32, 48, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    ours = nn.Conv2d(32, 48, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    ours.load_state_dict(plain.state_dict())
    speed_up_tiny_images(ours)
    images, grad = channels_last(20, 32, side, side), channels_last(20, 48, side, side)
    outputs, of_images = [], []
    for module in (plain, ours):
        fed = images.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            outputs.append(module(fed))
        outputs[-1].backward(grad.to(outputs[-1].dtype))
        of_images.append(fed.grad)
    assert ("_TinyConvolution" in outputs[1].grad_fn.name()) == (side <= MAX_SIDE)
    assert outputs[1].dtype is dtype
    assert outputs[1].is_contiguous(memory_format=torch.channels_last)
    # Added up in float32, or rounded to 8 bits once. (oneDNN's emulated bf16 adds up in bf16, and is 0.005 away.)
    bound = 1e-6 if dtype is torch.float32 else 2**-8
    exact_in = images.to(dtype).double().requires_grad_()
    kernels = plain.weight.detach().to(dtype).double().requires_grad_()
    exact = functional.conv2d(exact_in, kernels, padding=1)
    exact.backward(grad.to(dtype).double())
    if side > 2:
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(of_images[0], of_images[1])
    else:
        assert (outputs[1] - exact).norm() <= bound * exact.norm()
        assert (of_images[1] - exact_in.grad).norm() <= bound * exact_in.grad.norm()
    assert ours.weight.grad.dtype is torch.float32
    assert ours.weight.grad.is_contiguous(memory_format=torch.channels_last)
    if side > MAX_SIDE:
        assert torch.equal(ours.weight.grad, plain.weight.grad)
        return
    assert (ours.weight.grad - kernels.grad).norm() <= bound * kernels.grad.norm()


def test_others_are_left_alone() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    names = list(model.state_dict())
    speed_up_tiny_images(model)
    assert list(model.state_dict()) == names
    changed = {
        name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and type(module) is not nn.Conv2d
    }
    # All of the blocks' 3x3 convolutions but those that halve the image.
    blocks = [f"layer{layer}.{block}.conv{conv}" for layer in range(1, 5) for block in range(2) for conv in (1, 2)]
    assert changed == set(blocks) - {f"layer{layer}.0.conv1" for layer in (2, 3, 4)}


def test_scoring_runs_the_plain_convolution() -> None:
    convolution = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    speed_up_tiny_images(convolution)
    assert "_TinyConvolution" not in convolution.eval()(channels_last(2, 4, 2, 2)).grad_fn.name()


@pytest.mark.parametrize("compile", ["off", "on"])
def test_the_engine_takes_it_where_nothing_is_compiled(compile) -> None:
    """A compiler sees torch's own convolution."""
    plan = plan_device("cpu", "off", compile)
    model = build_resnet18(3, "imagenet")
    make_train_state(model, plan, lambda step: 0.1, make_recipe("seed"))
    assert (type(model.layer4[1].conv2) is nn.Conv2d) == (compile == "on")
