"""The training step against a plain torchvision and torch.optim loop, and evaluation's counting."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tidali.config import AmpChoice, Augment, Preprocess, TrainSettings
from tidali.dataset.contract import open_dataset
from tidali.errors import TidaliError, UsageError
from tidali.hardware.device import DevicePlan, plan_device
from tidali.hardware.ranks import Ranks
from tidali.loading.batches import Training
from tidali.loading.data import Data
from tidali.loading.order import epoch_order
from tidali.model.resnet import build_resnet18
from tidali.recipes import make_recipe
from tidali.training.averages import Ema, first_images, measure_statistics
from tidali.training.engine import (
    TrainState,
    all_finite,
    compiled,
    evaluate,
    make_train_state,
    train_epoch,
    train_step,
)
from tidali.training.metrics import Meter
from tidali.training.setup import set_up

STEPS = 6
"""Enough for the loss of one batch to fall to a third, and for momentum and learning rate to be those of several steps. A step
of the tests takes 0.4 s of processor time in float64 and 1 s in bfloat16, which most CPUs emulate."""


@pytest.fixture(scope="module")
def plan() -> DevicePlan:
    return plan_device("cpu", "off", "off")


def batches(count: int, size: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """Random images in NCHW memory and labels of 5 classes."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(size, 3, 32, 32, generator=generator), torch.randint(5, (size,), generator=generator)


def linear_state(plan: DevicePlan, **changes: float) -> TrainState:
    """A state around one linear layer: what a step does to weights can be written down."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    return make_train_state(model, plan, lambda step: 0.1, make_recipe("seed", **{"momentum": 0.0, **changes}))


# How far the losses of a plain loop and the engine may be apart, relative. The optimizer, fused in the engine, rounds once
# where the plain one rounds twice: weights were 1e-8 apart after twenty steps, and no loss differed in a bit. The first loss
# is also compared in NCHW memory, whose sums have another order: 7e-8 apart in float32, 0.0008 in bfloat16 with its 8 bits.
LOSS_TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 2**-8}
# Images and their side. At 64 px the engine's last convolutions are those of `tidali.hardware.cpu_convolution`: the same sums
# in another order, which float64 shows to be the same over all steps. In float32 a last bit of them turned some ReLU within
# seven steps, and grew to a ten-thousandth of the loss; at 100 px both loops add up alike.
IMAGES = {"float64": (2, 64), "float32": (2, 100), "bfloat16": (1, 100)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16"])
def test_steps_are_a_plain_loops(name: str) -> None:
    """One batch again and again, whose loss falls smoothly: with new random labels each step, batch norm over a few values
    turned a last bit into a tenth of the loss within twenty steps, and nothing could be compared."""
    generator = torch.Generator().manual_seed(1)
    (count, side), amp = IMAGES[name], "bf16" if name == "bfloat16" else "off"
    dtype = torch.float64 if name == "float64" else torch.float32
    images = torch.randn(count, 3, side, side, generator=generator, dtype=dtype)
    labels = torch.randint(5, (count,), generator=generator)
    torch.manual_seed(0)
    model = build_resnet18(5, "imagenet").to(dtype)
    plain = copy.deepcopy(model)

    def schedule(step: int) -> float:
        return 1e-4 * (step + 1)

    plan = plan_device("cpu", amp, "off")
    settings = dict(momentum=0.9, nesterov=True)
    state = make_train_state(model, plan, schedule, make_recipe("seed", weight_decay=0.01, label_smoothing=0.1, **settings))
    state.model.train()
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    batch = images.to(memory_format=torch.channels_last)
    losses = [smoothed(train_step(state, batch, labels).float(), labels) for _ in range(STEPS)]

    decayed = [module.weight for module in plain.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    others = [parameter for parameter in plain.parameters() if all(parameter is not weight for weight in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=1, **settings)
    plain.train()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp == "bf16")
    with autocast:
        first = smoothed(copy.deepcopy(plain)(images).float(), labels)  # in torch's own memory order, NCHW
    # The steps themselves in the engine's order: oneDNN sums in another one for NCHW, and the difference grows with the steps.
    plain.to(memory_format=torch.channels_last)
    expected = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        with autocast:
            logits = plain(batch)
        loss = smoothed(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.detach())

    assert len(losses) == len(expected) == state.step == STEPS
    assert expected[-1] < 0.5 * expected[0]  # it trained, so the comparison is of something
    torch.testing.assert_close(losses[0], first.detach(), rtol=LOSS_TOLERANCE[name], atol=0)  # sums in two orders
    torch.testing.assert_close(losses, expected, rtol=LOSS_TOLERANCE[name], atol=0)
    for (weight, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours - theirs).norm() <= LOSS_TOLERANCE[name] * theirs.norm(), weight


@pytest.mark.parametrize(("size", "accumulate"), [(8, 4), (10, 3)])
def test_pieces_of_a_batch_add_up_to_its_gradient(plan: DevicePlan, size: int, accumulate: int) -> None:
    """Where nothing looks across samples, as batch norm does. Pieces of 4, 3 and 3 count by their size."""
    images, labels = next(batches(1, size=size))
    whole = linear_state(plan)
    pieces = linear_state(plan, accumulate=accumulate)
    pieces.model.load_state_dict(whole.model.state_dict())
    logits = train_step(whole, images, labels)
    torch.testing.assert_close(train_step(pieces, images, labels), logits)
    for ours, theirs in zip(pieces.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # float32 sums in two orders
    assert pieces.step == 1


def test_batch_norm_sees_each_piece_by_itself(plan: DevicePlan) -> None:
    images, labels = next(batches(1))
    state = make_train_state(
        nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 32 * 32, 5)),
        plan,
        lambda step: 0.1,
        make_recipe("seed", accumulate=2),
    )
    train_step(state, images, labels)
    assert state.model[0].num_batches_tracked.item() == 2


@pytest.mark.parametrize("accumulate", [1, 3])
def test_ranks_add_up_gradients_once_a_step(plan: DevicePlan, tmp_path: Path, accumulate: int) -> None:
    """DistributedDataParallel over a group of one, with its sums counted: one, of all pieces' gradients."""
    sums = []

    class OneOfSeveral(Ranks):
        def wrap(self, model: nn.Module) -> nn.Module:
            wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

            def hook(_, bucket):  # torch allows its own annotations alone
                sums.append(bucket.buffer().clone())
                future: torch.futures.Future[Tensor] = torch.futures.Future()
                future.set_result(bucket.buffer())
                return future

            wrapped.register_comm_hook(None, hook)
            return wrapped

    images, labels = next(batches(1, size=9))
    alone = linear_state(plan, accumulate=accumulate)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = copy.deepcopy(alone.model)
        recipe = make_recipe("seed", momentum=0.0, accumulate=accumulate)
        state = make_train_state(model, plan, lambda step: 0.1, recipe, ranks=OneOfSeveral(joined=True))
        for step in (1, 2):
            for one in (alone, state):
                train_step(one, images, labels)
            assert len(sums) == step
    finally:
        torch.distributed.destroy_process_group()
    for ours, theirs in zip(state.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_no_piece_is_left_with_a_single_sample(plan: DevicePlan) -> None:
    """Batch norm over one value a channel raises: 10 samples in 4 pieces are 3, 3, 2 and 2."""
    images, labels = next(batches(1, size=10))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5), nn.BatchNorm1d(5))
    state = make_train_state(model, plan, lambda step: 0.1, make_recipe("seed", accumulate=4))
    assert len(train_step(state, images, labels)) == 10


def test_a_rank_needs_two_samples_for_each_piece(plan: DevicePlan, demo_data: Path) -> None:
    settings = TrainSettings(data="", out="", recipe=make_recipe("seed", batch_size=40, accumulate=6))
    with pytest.raises(UsageError, match=r"--batch-size 40: 4 ranks .* 48 images"):
        set_up(settings, open_dataset(demo_data), plan, Ranks(world_size=4))


def test_flip_tta_averages_the_logits_of_flipped_images(plan: DevicePlan) -> None:
    model = linear_state(plan).model
    data = list(batches(2))
    score = evaluate(model, data, plan, expected_samples=16, flip=True)
    with torch.inference_mode():
        means = [((model(images) + model(images.flip(3))) / 2, labels) for images, labels in data]
    assert score.loss == pytest.approx(sum(functional.cross_entropy(*pair).item() for pair in means) / 2, rel=1e-6)
    assert score.correct1 == sum(int((logits.argmax(1) == labels).sum()) for logits, labels in means)


@pytest.mark.slow
def test_each_size_is_compiled_once_and_its_seconds_are_told_apart() -> None:
    plan = plan_device("cpu", "off", "on")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    eager = copy.deepcopy(model)
    recipe = make_recipe("seed", momentum=0.0)
    state = make_train_state(model, plan, lambda step: 0.1, recipe)
    images, labels = next(batches(1))
    data = [(images, labels), (images[..., :16, :16], labels), (images, labels), (images[..., :16, :16], labels)]
    torch._dynamo.utils.counters.clear()
    report = train_epoch(state, data, Meter(plan.device))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(state.compiled) == 2
    assert 0 < report.compile_s == state.compile_s < report.seconds
    assert report.images_per_s == pytest.approx(16 / (report.seconds - report.compile_s))
    again = train_epoch(state, data, Meter(plan.device))
    assert again.compile_s == 0
    uncompiled = make_train_state(eager, plan_device("cpu", "off", "off"), lambda step: 0.1, recipe)
    for _ in range(2):
        train_epoch(uncompiled, data, Meter(plan.device))
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # eight steps, fused sums in another order


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_deterministic_run_compiles_deterministically(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    inductor = pytest.importorskip("torch._inductor.config")
    if not hasattr(inductor, "deterministic"):
        pytest.skip("this torch has no such mode")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    with inductor.patch(deterministic=False):
        compiled(nn.Linear(2, 2), plan_device("cpu", "off", "on"))
        assert inductor.deterministic is deterministic


def test_the_model_stays_channels_last(plan: DevicePlan) -> None:
    state = make_train_state(build_resnet18(5, "small"), plan, lambda step: 0.1, make_recipe("seed"))
    train_step(state, *next(batches(1, size=2)))
    convolutions = [parameter for parameter in state.model.parameters() if parameter.ndim == 4]
    assert len(convolutions) == 20
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)


def test_a_first_step_that_overflows_in_fp16_changes_nothing() -> None:
    """Neither weights nor momentum: the step after it is the first step of a run without it, but for the loss's scale."""
    images, labels = next(batches(1))
    states = []
    for overflows in (True, False):
        torch.manual_seed(0)
        state = linear_state(plan_device("cpu", "fp16", "off"), momentum=0.9, weight_decay=0.01)
        if overflows:
            before = copy.deepcopy(state.model.state_dict())
            train_step(state, images * float("inf"), labels)
            assert state.scaler.get_scale() == 2**15  # halved: the scaler saw it
            assert all(torch.equal(tensor, before[name]) for name, tensor in state.model.state_dict().items())
            for values in state.optimizer.state.values():
                assert not values["momentum_buffer"].any()
        train_step(state, images, labels)
        states.append(state)
    for ours, theirs in zip(states[0].model.parameters(), states[1].model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)  # gradients in float16 under two scales


def test_label_smoothing_is_for_training_alone(plan: DevicePlan) -> None:
    state = linear_state(plan, label_smoothing=0.5)
    data = list(batches(2))
    score = evaluate(state.model, data, plan, expected_samples=16)
    with torch.inference_mode():
        losses = [functional.cross_entropy(state.model(images), labels).item() for images, labels in data]
    assert score.loss == pytest.approx(sum(losses) / 2, rel=1e-6)  # two means of eight float32 losses


def test_gradients_are_clipped_to_their_norm(plan: DevicePlan) -> None:
    images, labels = next(batches(1))
    for limit, expected in ((0.01, 0.01), (1e9, None)):
        state = linear_state(plan, grad_clip_norm=limit)
        before = [parameter.detach().clone() for parameter in state.model.parameters()]
        loss = functional.cross_entropy(state.model(images), labels)
        norm = torch.stack([g.norm() for g in torch.autograd.grad(loss, list(state.model.parameters()))]).norm().item()
        assert norm > 0.1
        train_step(state, images, labels)
        moved = torch.stack([(p.detach() - q).norm() for p, q in zip(state.model.parameters(), before, strict=True)]).norm()
        # lr is 0.1; float32 differences of weights near 0.02 leave about 1e-4 of a step this small.
        assert moved.item() / 0.1 == pytest.approx(expected if expected else norm, rel=1e-3)


def test_ema_is_its_formula(plan: DevicePlan) -> None:
    state = linear_state(plan, ema_decay=0.3)
    expected = [parameter.detach().clone() for parameter in state.model.parameters()]
    for step, (images, labels) in enumerate(batches(5), start=1):
        train_step(state, images, labels)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, state.model.parameters(), strict=True)]
    averaged = list(state.evaluated.parameters())
    assert state.evaluated is state.ema.model
    for average, value in zip(averaged, expected, strict=True):
        torch.testing.assert_close(average, value, rtol=1e-5, atol=1e-7)  # five float32 interpolations
    without = linear_state(plan)
    assert without.evaluated is without.model


def test_ema_averages_batch_norm_statistics_and_leaves_counters(plan: DevicePlan) -> None:
    model = nn.BatchNorm2d(3)
    ema = Ema(model, 0.5)
    model.running_mean.fill_(4.0)
    model.num_batches_tracked.fill_(7)
    ema.update(1000)
    assert ema.model.running_mean.tolist() == [2.0, 2.0, 2.0]
    assert ema.model.num_batches_tracked.item() == 0
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def test_ema_averages_a_shared_tensor_once(plan: DevicePlan) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    ema = Ema(model, decay=0.5)
    with torch.no_grad():
        before = model[0].weight.clone()
        model[0].weight += 1
    ema.update(100)
    torch.testing.assert_close(ema.model[1].weight, before + 0.5)


@pytest.mark.parametrize("cache", ["device", "off"])
def test_statistics_are_measured_on_the_first_images_of_the_order(plan: DevicePlan, demo_data: Path, cache: str) -> None:
    """A random sample even where the shards are sorted by class; as an evaluation sees them."""
    data = Data(open_dataset(demo_data), plan.device, cache=cache)
    preprocess = Preprocess(res=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))
    training = Training(augment=Augment(flip="random", crop_scale=(0.2, 1.0)), seed=3)
    train_batches = data.batches("train", preprocess, 16, training=training)
    found = first_images(data, train_batches, preprocess, 40, torch.float32)
    evaluated = torch.cat([images for images, _ in data.batches("train", preprocess, 64)])
    assert torch.equal(found, evaluated[epoch_order(len(evaluated), 3, 0)[:40]])
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_statistics_are_those_of_the_evaluated_weights(plan: DevicePlan, ema_decay: float) -> None:
    """Against the mean and the variance of what reaches batch norm, whatever was there before; dropout is off meanwhile."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, 5))
    state = make_train_state(model, plan, lambda step: 0.1, make_recipe("seed", ema_decay=ema_decay))
    images, labels = next(batches(1))
    train_step(state, images, labels)
    evaluated = state.evaluated
    measure_statistics(evaluated, images, plan)
    with torch.no_grad():
        reached = evaluated[1](images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(evaluated[2].running_mean, reached.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(evaluated[2].running_var, reached.var(1), rtol=1e-5, atol=1e-6)
    assert evaluated[2].momentum == 0.1
    assert not any(module.training for module in evaluated.modules())


def test_an_epoch_counts_and_reports(plan: DevicePlan) -> None:
    state, called = linear_state(plan), []
    report = train_epoch(state, batches(3), Meter(plan.device), on_step=lambda _: called.append(state.step))
    assert called == [1, 2, 3]
    assert report.score.samples == 24
    assert report.seconds > 0
    assert report.images_per_s == pytest.approx(24 / report.seconds)
    assert 0 <= report.data_wait_share <= 1


class Reads(TorchDispatchMode):
    """Counts the values that the host asks of a tensor, for which it would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += "_local_scalar_dense" in str(function)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_no_step_reads_a_value(amp: AmpChoice) -> None:
    """With averaged weights, clipping, pieces, a gradient scaler, the meter and the display of progress."""
    plan = plan_device("cpu", amp, "off")
    state = linear_state(plan, ema_decay=0.9, grad_clip_norm=1.0, accumulate=2, momentum=0.9, label_smoothing=0.1)
    meter = Meter(plan.device)
    with Reads() as reads:
        torch.zeros(1).item()
    assert reads.count == 1
    with Reads() as reads:
        for images, labels in batches(3):
            meter.update(train_step(state, images, labels), labels)
            meter.peek()
    assert reads.count == 0
    assert state.step == 3


def test_a_loss_that_is_not_finite_is_the_epochs(plan: DevicePlan) -> None:
    images, labels = next(batches(1))
    state = linear_state(plan)
    assert all_finite(state.model)
    report = train_epoch(state, [(images * float("inf"), labels), (images, labels)], Meter(plan.device))
    assert not math.isfinite(report.score.loss_sum)
    assert not all_finite(state.model)


def test_statistics_that_are_not_finite_are_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert all_finite(model)
    model[1].running_var[1] = float("inf")
    assert not all_finite(model)


def test_evaluation_counts_every_sample_once_and_learns_nothing(plan: DevicePlan) -> None:
    model = build_resnet18(5, "imagenet").train()
    before = copy.deepcopy(model.state_dict())
    images, labels = next(batches(1, size=10))
    data = [(images[:7], labels[:7]), (images[7:], labels[7:]), (images[:0], labels[:0])]  # a rank's last batch may be empty
    score = evaluate(model, data, plan, expected_samples=10)
    with torch.inference_mode():
        logits = model.eval()(images)
    assert score.samples == 10
    assert score.correct1 == (logits.argmax(1) == labels).sum()
    assert score.correct5 == 10
    # Batches of 7, 3 and 10 may sum in another order.
    assert score.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("expected_samples", [15, 17, 0])
def test_evaluation_refuses_another_number_of_samples(plan: DevicePlan, expected_samples: int) -> None:
    with pytest.raises(TidaliError, match=f"evaluated 16 samples, the split has {expected_samples}"):
        evaluate(linear_state(plan).model, batches(2), plan, expected_samples=expected_samples)


def test_a_bf16_step_keeps_float32_weights() -> None:
    plan = plan_device("cpu", "bf16", "off")
    state = linear_state(plan)
    assert train_step(state, *next(batches(1))).dtype is torch.bfloat16
    assert {parameter.dtype for parameter in state.model.parameters()} == {torch.float32}
