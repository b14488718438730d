"""Parts of a network that keep their weights, and parts that learn faster than others."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor
from torch.nn import functional

from tidali.config import TrainSettings
from tidali.errors import UsageError
from tidali.hardware.device import DevicePlan, plan_device
from tidali.model.parts import frozen_modules, set_training
from tidali.model.resnet import build_resnet18, training_activations
from tidali.recipes import make_recipe
from tidali.training.averages import measure_statistics
from tidali.training.engine import TrainState, make_train_state, train_step


@pytest.fixture(scope="module")
def plan() -> DevicePlan:
    return plan_device("cpu", "off", "off")


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 1])


def state_of(plan: DevicePlan, **changes: object) -> TrainState:
    torch.manual_seed(0)
    state = make_train_state(build_resnet18(3, "imagenet"), plan, lambda step: 0.1, make_recipe("seed", **changes))
    set_training(state.model, state.frozen)
    return state


def part_of(name: str) -> str:
    """``stem``, ``layer1``, ..., ``fc``."""
    first = name.partition(".")[0]
    return "stem" if first in ("conv1", "bn1") else first


@pytest.mark.parametrize(
    ("freeze", "kept"),
    [("stem", {"stem"}), ("layer2", {"stem", "layer1", "layer2"}), ("body", {"stem", "layer1", "layer2", "layer3", "layer4"})],
)
def test_frozen_parts_keep_every_bit(plan: DevicePlan, batch: tuple[Tensor, Tensor], freeze: str, kept: set[str]) -> None:
    """Weights and batch norm's statistics, through steps with decay, averaging and measured statistics; no gradient is made,
    and autograd keeps nothing of them."""
    state = state_of(plan, freeze=freeze, weight_decay=0.1, ema_decay=0.5)
    before = copy.deepcopy(state.model.state_dict())
    for _ in range(2):
        train_step(state, *batch)
    measure_statistics(state.evaluated, batch[0], plan, state.frozen)
    for model in (state.model, state.evaluated):
        changed = {part_of(name) for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == {"stem", "layer1", "layer2", "layer3", "layer4", "fc"} - kept
    trained = {id(parameter) for group in state.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(one) for name, one in state.model.named_parameters() if part_of(name) not in kept}


def test_autograd_keeps_nothing_of_what_is_frozen() -> None:
    """Elements of feature maps an image, of torchvision's layers: the engine's CPU layers keep other ones."""
    kept = []
    for freeze in ("none", "stem", "layer2", "body"):
        model = build_resnet18(3, "imagenet")
        for name in frozen_modules(freeze):
            model.get_submodule(name).requires_grad_(False)
        kept.append(training_activations(model, 64))
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4
    assert kept[-1] == 512  # what the head's weights are multiplied by


def test_each_part_moves_by_its_own_learning_rate(plan: DevicePlan, batch: tuple[Tensor, Tensor]) -> None:
    """A step without momentum against the gradient of torchvision's own network, times the rate worked out by hand."""
    state = state_of(plan, head_lr_scale=10.0, stage_lr_decay=0.5, momentum=0.0)
    plain = torchvision.models.resnet18(num_classes=3)
    plain.load_state_dict(state.model.state_dict())
    functional.cross_entropy(plain(batch[0]), batch[1]).backward()
    train_step(state, *batch)
    scales = {"fc": 10.0, "layer4": 1.0, "layer3": 0.5, "layer2": 0.25, "layer1": 0.125, "stem": 0.0625}
    for (name, moved), was in zip(state.model.named_parameters(), plain.parameters(), strict=True):
        expected = was.detach() - 0.1 * scales[part_of(name)] * was.grad
        # Sums in another memory order: of float32 gradients, which batch norm over four images of one pixel makes large.
        assert (moved.detach() - expected).norm() <= 1e-3 * (was.detach() - expected).norm() + 1e-7, name


def test_one_learning_rate_for_all_has_the_optimizer_of_earlier_runs(plan: DevicePlan) -> None:
    """Their states number the parameters: first those of two or more dimensions, then the others."""
    state = state_of(plan)
    order = [one for group in state.optimizer.param_groups for one in group["params"]]
    parameters = list(state.model.parameters())
    expected = [one for one in parameters if one.ndim >= 2] + [one for one in parameters if one.ndim < 2]
    assert [id(one) for one in order] == [id(one) for one in expected]


def test_random_weights_are_not_frozen() -> None:
    recipe = make_recipe("finetune", freeze="body")
    with pytest.raises(UsageError, match="freeze body: random weights would never be trained; give --init"):
        TrainSettings(data="d", out="o", recipe=recipe)
    assert TrainSettings(data="d", out="o", init="imagenet", recipe=recipe).recipe.freeze == "body"
