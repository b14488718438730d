"""Checks of loading, training and evaluation that must pass on any device, each small enough to run anywhere.

`tidali doctor` runs all of them, and so do the tests. A check returns one line that says what it found, or raises a TidaliError
that says what is wrong and by how much.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor, multiprocessing
from torch.nn import functional

from tidali.config import AmpChoice, Augment, CacheChoice, CompileChoice, DecoderChoice, Preprocess
from tidali.console import silenced
from tidali.dataset.contract import Dataset
from tidali.errors import TidaliError, counted
from tidali.hardware.device import numerics, plan_device
from tidali.hardware.processes import own_import_path
from tidali.hardware.ranks import check_all_reduce
from tidali.hardware.timing import Stopwatch
from tidali.loading.batches import Batches, Training
from tidali.loading.data import Data
from tidali.model.resnet import build_resnet18
from tidali.recipes import make_recipe
from tidali.training.engine import TrainState, evaluate, make_train_state, train_step

PIXEL_RESOLUTIONS = (64, 96)
"""The size of the stored sample images, which needs no resizing, and a larger one."""
_CLOSE_GREY_LEVELS = 4.0
_CLOSE_FRACTION = 0.999
_MEAN_GREY_LEVELS = 1.0
_STEPS = 15
_RANKS_TIMEOUT_S = 60

CPU = torch.device("cpu")


def require(condition: bool, text: str) -> None:
    """
    Raises:
        TidaliError: the condition does not hold.
    """
    if not condition:
        raise TidaliError(text)


def routes_agree(dataset: Dataset, device: torch.device) -> str:
    """Every way of loading val returns the batches of the stream on the CPU: the same number, order, labels and pixels.

    Grey levels may differ a little: nvJPEG and libjpeg-turbo round their inverse DCT and colour conversion differently, by one
    or two, and a resize spreads that. The bounds, 1 on average and 4 for 99.9 % of the values, were estimated from this. They
    are **not measured** on a GPU.

    Raises:
        TidaliError: names the route, the resolution and the difference.
    """
    largest: dict[str, float] = {}
    for res in PIXEL_RESOLUTIONS:
        expected = list(_batches(dataset, CPU, "off", res, 20))
        for route, batches in _other_routes(dataset, res, device):
            where, got = f"{route} at {res} px", list(batches)
            require(len(got) == len(expected), f"{where}: {len(got)} batches, the stream on the CPU has {len(expected)}")
            for (images, labels), (cpu_images, cpu_labels) in zip(got, expected, strict=True):
                require(images.device == labels.device == device, f"{where}: on {images.device}, not on {device}")
                require(images.is_contiguous(memory_format=torch.channels_last), f"{where}: not channels-last")
                require(torch.equal(labels.cpu(), cpu_labels), f"{where}: the labels are not those on the CPU")
                largest[route] = max(largest.get(route, 0.0), _require_close(images, cpu_images, where))
    differences = ", ".join(f"{route} {difference:.2f}" for route, difference in largest.items())
    where = " and ".join(str(res) for res in PIXEL_RESOLUTIONS)
    return f"largest difference from the stream on the CPU, at {where} px, in grey levels: {differences}"


def _other_routes(dataset: Dataset, res: int, device: torch.device) -> Iterator[tuple[str, Batches]]:
    if device.type != "cpu":
        for decoder in get_args(DecoderChoice):
            yield f"the stream on {device}, --decoder {decoder}", _batches(dataset, device, "off", res, 20, decoder=decoder)
        for dtype in (torch.float16, torch.bfloat16):  # as --amp has them made
            yield f"the cache on {device}, {dtype}", _batches(dataset, device, "device", res, 20, dtype=dtype)
    yield f"the cache on {device}", _batches(dataset, device, "device", res, 20)


def _batches(
    dataset: Dataset,
    device: torch.device,
    cache: CacheChoice,
    res: int,
    batch_size: int,
    *,
    training: Training | None = None,
    decoder: DecoderChoice = "auto",
    dtype: torch.dtype = torch.float32,
) -> Batches:
    """Of train or, without ``training``, of val; with pixels in 0..1."""
    split = "val" if training is None else "train"
    with silenced():
        data = Data(dataset, device, cache=cache, decoder=decoder)
        return data.batches(split, Preprocess(res=res), batch_size, training=training, dtype=dtype)


def _require_close(images: Tensor, expected: Tensor, where: str) -> float:
    grey_levels = 255 * (images.float().cpu() - expected).abs().flatten()
    largest, mean = grey_levels.max().item(), grey_levels.mean().item()
    close = (grey_levels <= _CLOSE_GREY_LEVELS).float().mean().item()
    require(
        mean <= _MEAN_GREY_LEVELS and close >= _CLOSE_FRACTION,
        f"{where}: {largest:.2f} grey levels from the CPU's pixels at most, {mean:.2f} on average",
    )
    return largest


def epochs_are_complete(dataset: Dataset, device: torch.device) -> str:
    """Two shuffled epochs of train with random flips, from the cache and from the stream, have every class as often as the
    manifest says.

    Raises:
        TidaliError: names the route and the counts.
    """
    split = dataset.split("train")
    expected = list(split.class_counts)
    batch_size = next(size for size in range(min(40, split.samples), 0, -1) if split.samples % size == 0)
    routes: tuple[CacheChoice, ...] = ("off", "device")
    for cache in routes:
        batches = _batches(dataset, device, cache, 64, batch_size, training=Training(augment=Augment(flip="random")))
        for epoch in range(2):
            batches.set_epoch(epoch)
            counts = torch.bincount(torch.cat([labels for _, labels in batches]), minlength=len(expected)).tolist()
            route = "the stream" if cache == "off" else "the cache"
            require(counts == expected, f"{route} returned {counts} images of the classes instead of {expected}")
    return f"each of {split.samples} training images comes once per epoch, from both the stream and the cache"


def precisions(device: torch.device, chosen: torch.dtype | None) -> tuple[AmpChoice, ...]:
    """The precisions to check: on a GPU all that it supports; on a CPU only the chosen one, as it would emulate the others."""
    if device.type == "cuda":
        return ("bf16", "fp16", "off") if torch.cuda.is_bf16_supported(including_emulation=False) else ("fp16", "off")
    return ("bf16",) if chosen is torch.bfloat16 else ("off",)


@numerics()
def steps_lower_the_loss(device: torch.device, amp: AmpChoice, compile: CompileChoice = "off") -> str:
    """15 training steps of ResNet-18 on one batch of 16 images of 32 px lower the loss to less than half.

    Raises:
        TidaliError: names the precision and the losses.
    """
    state, (images, labels) = _tiny_state(device, amp, compile), _one_batch(device)
    how = state.plan.dtype_name + ("" if compile == "off" else ", compiled" if compile == "on" else f", --compile {compile}")
    losses = []
    for _ in range(_STEPS):
        logits = train_step(state, images, labels)
        losses.append(functional.cross_entropy(logits.float(), labels).item())
    expected = state.plan.amp_dtype or torch.float32
    require(logits.dtype is expected, f"{how}: the output is {logits.dtype}")
    kept = {parameter.dtype for parameter in state.model.parameters()}
    require(kept == {torch.float32}, f"{how}: the weights are {kept} instead of float32")
    # Written so that NaN fails too.
    require(losses[-1] < 0.5 * losses[0], f"{how}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {_STEPS} steps")
    return f"{how}: the loss fell from {losses[0]:.2f} to {losses[-1]:.2f} in {_STEPS} steps"


@numerics()
def compiled_matches_eager(device: torch.device) -> str:
    """The compiled model's output equals the eager model's, in float32.

    Raises:
        TidaliError: names the difference, or nothing was compiled.
    """
    state, (images, _) = _tiny_state(device, "off", "on"), _one_batch(device)
    require(state.forward is not state.model, "nothing was compiled")
    state.model.eval()
    with torch.inference_mode():
        eager, compiled = state.model(images), state.forward(images)
    difference = (eager - compiled).abs().max().item()
    # All in float32, but fused kernels sum in another order, over 18 layers.
    fits = torch.allclose(compiled, eager, rtol=1e-3, atol=1e-3)
    require(fits, f"the compiled model's output differs from the eager model's by {difference:.2g}")
    return f"outputs differ from the eager model's by at most {difference:.1g}"


def _tiny_state(device: torch.device, amp: AmpChoice, compile: CompileChoice = "off") -> TrainState:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_resnet18(4, "imagenet")
    return make_train_state(
        model,
        plan_device("cpu" if device.type == "cpu" else "cuda", amp, compile),
        lambda step: 0.01,
        make_recipe("modern", ema_decay=0.0),
    )


def _one_batch(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
    return images, torch.randint(4, (16,), generator=generator).to(device)


@numerics()
def evaluation_counts_once(dataset: Dataset, device: torch.device) -> str:
    """Evaluation counts every sample of val exactly once, at any batch size.

    Raises:
        TidaliError: another number of samples, or a loss that depends on the batch size.
    """
    state = _tiny_state(device, "auto")
    samples = dataset.split("val").samples
    scores = [
        evaluate(
            state.model,
            _batches(dataset, device, "auto", 32, batch_size),
            state.plan,
            expected_samples=samples,
        )
        for batch_size in (7, samples)
    ]
    one, other = (score.loss for score in scores)
    # In half precision the result of a product depends on the batch size, by far less than one sample's loss.
    text = f"the loss on val is {one:.4f} in batches of 7, but {other:.4f} in one batch"
    require(abs(one - other) <= 1e-2 * abs(other), text)
    return f"all {samples} samples of val are counted once, at any batch size"


def ranks_communicate(device_type: str, ranks: int) -> str:
    """An all-reduce over this many ranks works: by NCCL with one rank per GPU, or by gloo on the CPU.

    A single rank runs in this process, several in processes of their own.

    Raises:
        TidaliError: it does not work, or takes more than a minute.
    """
    backend = "nccl" if device_type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        try:
            if ranks == 1:
                check_all_reduce(0, backend, 1, folder)
            else:
                _check_all_reduce_in_processes(backend, ranks, folder)
        except Exception as error:
            reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1:]
            raise TidaliError(f"{backend}: {(reason or [type(error).__name__])[0][:200]}") from None
    return f"{backend}: all-reduce over {counted(ranks, 'rank')} works"


def _check_all_reduce_in_processes(backend: str, ranks: int, folder: str) -> None:
    with own_import_path():
        context: Any = multiprocessing.start_processes(
            check_all_reduce, (backend, ranks, folder), nprocs=ranks, join=False, start_method="spawn"
        )
    try:
        watch = Stopwatch()
        while not context.join(timeout=1):  # true when every process has ended
            if watch.peek_s() > _RANKS_TIMEOUT_S:
                raise TidaliError(f"{ranks} ranks did not reach each other within {_RANKS_TIMEOUT_S} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
