from __future__ import annotations

import pytest
import torch
from torch import nn

from tidali.hardware.cpu_optimizer import ChannelsLastSGD
from tidali.hardware.device import plan_device
from tidali.recipes import make_recipe
from tidali.training.engine import make_train_state

SETTINGS = [dict(momentum=0.9, nesterov=True, weight_decay=1e-2), dict(momentum=0.9), dict(weight_decay=1e-2)]


def model() -> nn.Module:
    torch.manual_seed(4)
    # A kernel of one pixel is contiguous in both orders; a vector has one order.
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(5 * 36, 4)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("grad_order", [torch.channels_last, torch.contiguous_format])
def test_ten_steps_are_torchs(settings: dict[str, float], grad_order: torch.memory_format) -> None:
    ours, theirs = model(), model()
    optimizers = (
        ChannelsLastSGD(ours.parameters(), lr=0.1, fused=True, **settings),
        torch.optim.SGD(theirs.parameters(), lr=0.1, fused=False, **settings),
    )
    for parameter in ours.parameters():
        optimizers[0].state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    generator = torch.Generator().manual_seed(5)
    for step in range(10):
        for pair in zip(ours.parameters(), theirs.parameters(), strict=True):
            grad = torch.randn(pair[0].shape, generator=generator)
            for parameter in pair:
                order = grad_order if grad.ndim == 4 else torch.contiguous_format
                parameter.grad = grad.contiguous(memory_format=order)
        if step == 5:
            ours[0].bias.grad = theirs[0].bias.grad = None
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.step()
    for mine, torchs in zip(ours.parameters(), theirs.parameters(), strict=True):
        # The fused one rounds once where the other rounds twice: ten roundings of values of the size of 1.
        torch.testing.assert_close(mine, torchs, rtol=0, atol=2e-6)
        assert mine.stride() == torchs.stride()


def test_its_state_is_torchs() -> None:
    """The state that one saves can be loaded by the other."""
    plan = plan_device("cpu", "off", "off")
    state = make_train_state(model(), plan, lambda step: 0.1, make_recipe("seed", nesterov=True, weight_decay=1e-2))
    assert isinstance(state.optimizer, ChannelsLastSGD)
    sum(parameter.square().sum() for parameter in state.model.parameters()).backward()
    state.optimizer.step()
    other = torch.optim.SGD(model().parameters(), lr=0.1)
    one, none = state.optimizer.state_dict(), other.state_dict()
    assert one["param_groups"][0].keys() - {"lr_scale"} == none["param_groups"][0].keys()  # which the engine alone reads
    assert {tuple(values) for values in one["state"].values()} == {("momentum_buffer",)}


def test_no_gradient_is_copied() -> None:
    convolution = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    optimizer = ChannelsLastSGD(convolution.parameters(), lr=0.1, fused=True)
    for parameter in convolution.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    names = {event.key for event in profile.key_averages()}
    assert "aten::_fused_sgd_" in names
    assert "aten::clone" not in names
