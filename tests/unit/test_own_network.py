"""A network that is no ResNet of tidali's, trained by `tidali.train_model`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tidali
from tidali.errors import Interrupted, UsageError
from tidali.hardware.device import plan_device
from tidali.hardware.ranks import Ranks
from tidali.training import run as run_module
from tidali.training.interrupt import StopRequest
from tidali.training.own_network import check_own_network


class Patches(nn.Module):
    """A small mixer of patches: layer norm, dropout, and names that a ResNet has, used otherwise."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 8, stride=8)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
        self.norm, self.dropout, self.head = nn.LayerNorm(16), nn.Dropout(0.2), nn.Linear(16, classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.bn1(self.conv1(images)))
        pooled = self.maxpool(-maps).mean((2, 3))  # of what is below zero: ReLU and pooling must not change places
        return self.head(self.dropout(self.relu(self.norm(pooled))))


class AuxiliaryHead(Patches):
    """In training it returns two outputs, as torchvision's Inception does."""

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


def network(**arguments: int) -> nn.Module:
    torch.manual_seed(5)
    return Patches(**arguments)


def settings_for(data: Path, out: Path, **changes: Any) -> tidali.TrainSettings:
    recipe = tidali.make_recipe("modern", epochs=3, batch_size=40)
    return tidali.TrainSettings(
        data=str(data), out=str(out), res=32, recipe=recipe, device="cpu", deterministic=True, **changes
    )


class After(StopRequest):
    """Asks for a stop when it has been asked so many times."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0


def check_resumes(make: Callable[[], nn.Module], data: Path, folder: Path) -> tidali.TrainSettings:
    """Stopped within the second epoch of four steps and resumed, it ends with the bits of a run that was left alone.

    Returns:
        That run's settings.
    """
    whole, broken = (settings_for(data, folder / name) for name in ("whole", "broken"))
    expected = tidali.train_model(whole, model=make())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_module, "StopRequest", lambda: After(6))
        with pytest.raises(Interrupted):
            tidali.train_model(broken, model=make())
    found = tidali.train_model(broken, resume=True, model=make())
    assert (found.last, found.best) == (expected.last, expected.best)
    one, other = (load_file(Path(settings.out) / "last.safetensors") for settings in (whole, broken))
    assert one.keys() == make().state_dict().keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    return whole


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_a_network_of_timms_is_resumed_to_the_bit(demo_data: Path, tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm", reason="tidali does not need it")

    def make() -> nn.Module:
        torch.manual_seed(5)
        return timm.create_model(name, num_classes=4, drop_rate=0.2)

    check_resumes(make, demo_data, tmp_path)


def test_stopped_and_resumed_it_ends_with_the_same_bits(demo_data: Path, tmp_path: Path) -> None:
    whole = check_resumes(network, demo_data, tmp_path)
    one = load_file(Path(whole.out) / "last.safetensors")

    with pytest.raises(UsageError, match=r"last\.safetensors: the weights of a network of your own, .*model="):
        tidali.load_model(tmp_path / "whole" / "last.safetensors")
    model = tidali.load_model(tmp_path / "whole" / "last.safetensors", device="cpu", model=network())
    images = torch.rand(2, 32, 32, 3).mul(255).to(torch.uint8)
    with torch.no_grad():  # what the network itself says of these pixels
        card = model.card
        mean, std = (torch.tensor(values)[:, None, None] for values in (card.mean, card.std))
        pixels = (images.permute(0, 3, 1, 2) / 255 - mean) / std
        plain = network().eval()
        plain.load_state_dict(one)
        torch.testing.assert_close(model.logits(list(images)), plain(pixels), rtol=1e-4, atol=1e-4)  # float32 in two orders
    with pytest.raises(UsageError, match="the settings are of a network of your own; give it to tidali"):
        tidali.train_model(replace(whole, arch="own", out=str(tmp_path / "new")))
    with pytest.raises(UsageError, match="the weights do not fit the model that was given"):
        tidali.load_model(tmp_path / "whole" / "last.safetensors", model=network(classes=5))


def not_finite(model: nn.Module) -> nn.Module:
    next(model.parameters()).detach()[0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("model", "changes", "complaint"),
    [
        (Patches(5), {}, r"model: returns \(2, 5\) for two images, and logits \(2, 4\) are needed"),
        (nn.Linear(7, 4), {}, r"model: fails on images \(2, 3, 32, 32\): RuntimeError"),
        (AuxiliaryHead(), {}, r"model: returns tuple for two images"),
        (Patches(4).requires_grad_(False), {}, "none of its parameters has requires_grad"),
        (not_finite(Patches(4)), {}, r"model: weights that are not finite: \w"),
        (Patches(4), {"init": "imagenet"}, "init and stem are for tidali's own networks"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    demo_data: Path, tmp_path: Path, model: nn.Module, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint) as refused:
        tidali.train_model(settings_for(demo_data, tmp_path / "run", **changes), model=model)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_ranks_are_not_given_parameters_without_gradients() -> None:
    """DistributedDataParallel would fail in the second step."""
    model, plan = Patches(), plan_device("cpu", "off", "off")
    model.other = nn.Linear(2, 2)
    settings = settings_for(Path("d"), Path("o"))
    check_own_network(model, 4, settings, plan, Ranks())
    with pytest.raises(UsageError, match=r"model: other\.weight has no part in its output"):
        check_own_network(model, 4, settings, plan, Ranks(world_size=2))
    model.other.requires_grad_(False)
    check_own_network(model, 4, settings, plan, Ranks(world_size=2))
