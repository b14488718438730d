"""How many operators CUDA is given for a batch, on fake tensors, and that what they compute is what a CPU makes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.unit.test_cache_on_cuda import EVERYTHING, NoneCorrupt, Streamed, cached_on
from tidali.config import IMAGENET_MEAN, IMAGENET_STD, Augment, Preprocess
from tidali.loading import changes
from tidali.loading.batches import Batches, Training
from tidali.loading.bicubic import bicubic_taps
from tidali.loading.cache import ANY_SIDE, PixelCache
from tidali.loading.dense import DenseResample, fold_borders
from tidali.loading.resample import Resample, make_band
from tidali.loading.sizes import SizePlan
from tidali.recipes import RECIPES

CUDA = torch.device("cuda", 0)
NORMALISED: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
LEVELS = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
BUDGET = {64: 12, 224: 16}
"""Operators a batch with every change but mixing, by input side."""
SAMPLES, BATCH_SIZE = 100_000, 256
"""Tiny-ImageNet's, and the batch that `tidali bench` trains with on a GPU."""


class Operators(TorchDispatchMode):
    """Counts the operators that launch something on CUDA: neither views nor uninitialised memory."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made = function(*arguments, **(keywords or {}))
        is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in function._schema.returns)
        on_cuda = any(isinstance(one, torch.Tensor) and one.device.type == "cuda" for one in tree_leaves(made))
        allocates = str(function).split(".")[1] in ("empty", "empty_like", "new_empty", "_unsafe_view")
        if (on_cuda and not is_view and not allocates) or "_local_scalar_dense" in str(function):
            self.counts[str(function)] += 1
        return made


def operators_a_batch(loader: Batches) -> tuple[float, Counter[str]]:
    """On average over an epoch, and those of a step alone. Three steps tell: in the first all is drawn, what two steps need is
    prepared, and a step is made; the second is a step alone; in the third what two steps need is prepared, too."""
    prepared_at_once = {made.prepare_steps for made in loader._changes.values()}
    drawn_at_once = min(min(made.draw_steps for made in loader._changes.values()), len(loader))
    for made in loader._changes.values():
        made.prepare_steps = 2
    steps = []
    batches = loader._rest_of_epoch(0, 0)
    for _ in range(3):
        with Operators() as seen:
            next(batches)
        steps.append(seen.counts)
    assert not any("_local_scalar_dense" in name for counts in steps for name in counts)  # nor waits the host for a value
    first, alone, third = (sum(counts.values()) for counts in steps)
    preparing = third - alone
    return (first - alone - preparing) / drawn_at_once + preparing / min(prepared_at_once) + alone, steps[1]


@pytest.mark.parametrize(
    ("dtype", "route"),
    [
        (torch.bfloat16, "cache"),
        (torch.float16, "cache"),
        (torch.float32, "cache"),
        (torch.bfloat16, "stream of one size"),
        (torch.bfloat16, "stream of squares"),
    ],
)
@pytest.mark.parametrize("res", BUDGET)
def test_a_batch_is_within_the_budget(res: int, dtype: torch.dtype, route: str) -> None:
    with FakeTensorMode():
        size = None if route == "stream of squares" else (64, 64)
        source = cached_on(CUDA, SAMPLES) if route == "cache" else Streamed(CUDA, SAMPLES, size)
        training = Training(augment=EVERYTHING)
        loader = Batches(source, Preprocess(res=res, **NORMALISED), BATCH_SIZE, training=training, dtype=dtype)
        found, counts = operators_a_batch(loader)
    assert found <= BUDGET[res], counts


@pytest.mark.parametrize(
    ("augment", "most"),
    [(RECIPES["modern"].augment, 4), (None, 4)],  # gather, to float32, normalise, clamp
    ids=["flips", "evaluation"],
)
def test_what_changes_less_launches_less(augment: Augment | None, most: int) -> None:
    with FakeTensorMode():
        training = Training(augment=augment) if augment is not None else None
        loader = Batches(cached_on(CUDA, SAMPLES), Preprocess(res=64, **NORMALISED), BATCH_SIZE, training=training)
        found, counts = operators_a_batch(loader)
    assert found <= most + 0.5, counts  # a share of what is made at once


def test_the_products_factors_are_half_precision() -> None:
    """What tensor cores multiply; of the AMP dtype alone float32 has none."""
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            if any(name in str(function) for name in ("mm", "matmul")):
                seen.append({one.dtype for one in arguments if isinstance(one, torch.Tensor)})
            return function(*arguments, **(keywords or {}))

    for dtype, expected in ((torch.bfloat16, torch.float16), (torch.float16, torch.float16), (torch.float32, torch.float32)):
        for augment in (Augment(), Augment(crop_scale=(0.5, 1.0))):
            seen.clear()
            with FakeTensorMode(), Products():
                training = Training(augment=augment)
                batches = Batches(cached_on(CUDA, 100), Preprocess(res=224, **NORMALISED), 50, training=training, dtype=dtype)
                next(batches._rest_of_epoch(0, 0))
            assert seen == [{expected}] * 2


def test_the_public_resampler_is_the_same_on_cuda() -> None:
    with FakeTensorMode():
        pixels = torch.empty(4, 50, 71, 3, dtype=torch.uint8, device=CUDA)
        resample = Resample((50, 71), Preprocess(res=64, **NORMALISED), dtype=torch.bfloat16, device=CUDA)
        boxes, flips = torch.ones(2, 4, device=CUDA), torch.zeros(2, dtype=torch.bool, device=CUDA)
        for images in (resample(pixels[:2]), resample(pixels, boxes, rows=torch.arange(2, device=CUDA), flips=flips)):
            assert (images.shape, images.dtype, images.device) == ((2, 3, 64, 64), torch.bfloat16, CUDA)
            assert images.is_contiguous(memory_format=torch.channels_last)


# --------------------------------------------------------------------------------------------- the same images as on a CPU


def cache_of(size: tuple[int, int], samples: int = 40) -> PixelCache:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.rand(samples, 3, 6, 6, generator=generator), size, mode="bicubic", align_corners=False
    )
    pixels = (255 * smooth).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return PixelCache(
        pixels={ANY_SIDE: pixels},
        labels=torch.arange(samples),
        identity="smooth",
        size=size,
        corrupt=NoneCorrupt(),  # type: ignore[arg-type]
    )


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA is given, computed on a CPU, for three steps at once."""

    def make(size: tuple[int, int], preprocess: Preprocess, batch_size: int, dtype: torch.dtype, device: torch.device) -> Any:
        resample = DenseResample(size, preprocess, dtype=dtype)
        made = changes.CudaChanges(resample, size, preprocess.res, batch_size)
        made.draw_steps, made.prepare_steps = 5, 3
        return made

    monkeypatch.setattr("tidali.loading.batches.make_changes", make)


@pytest.mark.parametrize("size", [(24, 24), (20, 33)])
@pytest.mark.parametrize(
    ("res", "dtype", "levels"), [(24, torch.float32, 0.01), (40, torch.float32, 0.01), (40, torch.float16, 0.5)]
)
@pytest.mark.parametrize(
    "augment",
    [
        Augment(),
        Augment(flip="random"),
        Augment(shift_px=3),
        Augment(flip="alternating", brightness=0.2),
        Augment(crop_scale=(0.3, 1.0)),
        EVERYTHING,
    ],
    ids=["nothing", "flips", "shifts", "colour", "crops", "everything"],
)
def test_the_images_are_those_of_a_cpu(
    augment: Augment, size: tuple[int, int], res: int, dtype: torch.dtype, levels: float, request: pytest.FixtureRequest
) -> None:
    """Sums in another order in float32; factors, an intermediate and the result of 11 bits in float16."""
    cache, preprocess = cache_of(size), Preprocess(res=res, crop_fraction=0.9, **NORMALISED)
    training = Training(augment=augment, seed=3, sizes=SizePlan(sides=(res, res + 8), order="mixed"))
    expected = list(Batches(cache, preprocess, 4, training=training))
    request.getfixturevalue("as_on_cuda")
    found = list(Batches(cache, preprocess, 4, training=training, dtype=dtype))
    assert len(found) == len(expected) == 10
    for (images, labels), (plain, plain_labels) in zip(found, expected, strict=True):
        assert torch.equal(labels, plain_labels)
        assert images.dtype == dtype
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert ((images.float() - plain) * LEVELS).abs().max() <= levels


def test_corrupt_samples_are_left_out_of_what_is_drawn(as_on_cuda: None) -> None:
    whole, broken = cache_of((24, 24)), cache_of((24, 24))
    broken.corrupt.positions = frozenset({3, 17, 18})  # type: ignore[misc]
    settings_ = {"training": Training(augment=EVERYTHING, seed=1)}
    for (images, labels), (kept, kept_labels) in zip(
        Batches(whole, Preprocess(res=24), 8, **settings_), Batches(broken, Preprocess(res=24), 8, **settings_), strict=True
    ):
        sound = torch.tensor([int(label) not in (3, 17, 18) for label in labels])
        assert torch.equal(kept_labels, labels[sound])
        # Products of a batch of another size may sum in another order.
        torch.testing.assert_close(kept, images[sound], rtol=0, atol=1e-5)


def test_a_resumed_epoch_draws_the_same(as_on_cuda: None) -> None:
    """From any step, although what is drawn and prepared at once begins there."""
    cache, training = cache_of((24, 24)), Training(augment=EVERYTHING, seed=1)
    unbroken = list(Batches(cache, Preprocess(res=24), 4, training=training))
    for step in (1, 4, 9):
        loader = Batches(cache, Preprocess(res=24), 4, training=training)
        loader.load_state_dict({**loader.state_dict(), "step": step})
        for (images, labels), (expected, expected_labels) in zip(loader, unbroken[step:], strict=True):
            assert torch.equal(labels, expected_labels)
            assert torch.equal(images, expected)


# ------------------------------------------------------------------------------------------------------- folded borders


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.floats(0.05, 1), st.booleans())
def test_folded_matrices_are_the_banded_ones(size: int, res: int, place: float, share: float, antialias: bool) -> None:
    """Of any box inside the image: what they make of any pixels."""
    length = max(share * size, 0.5)
    start, scale = torch.tensor([place * (size - length)]), torch.tensor([length / res])
    bound = max(size / res, 1.0)
    taps = bicubic_taps(res, start, scale, max_scale=bound, antialias=antialias)
    period = max(size, taps.weights.shape[2])
    index, weights = fold_borders(taps, torch.tensor(size), period)
    assert (index >= 0).all()
    assert (index < period).all()
    assert all(len(set(row.tolist())) == len(row) for row in index[0])  # scattering them is deterministic
    assert not weights[index >= size].any()
    folded = torch.zeros(1, res, period, dtype=torch.float64).scatter(2, index, weights.double())[:, :, :size]
    band = make_band(taps, size, max_scale=bound, block_rows=res)
    pixels = torch.rand(size, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    banded = band.weights[0, 0].double() @ pixels[band.columns[0]]
    torch.testing.assert_close(folded[0] @ pixels, banded, rtol=0, atol=1e-5)  # float32 weights, some added up


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 0.01), (torch.float16, 0.5), (torch.bfloat16, 1.0)])
@pytest.mark.parametrize("size", [(64, 64), (50, 71), (300, 401), (3, 2)])
def test_dense_resampling_is_the_banded(size: tuple[int, int], dtype: torch.dtype, largest: float) -> None:
    """On noise, of which the sharpest kernels make the most. float16: factors, an intermediate and the result of 11 bits each;
    bfloat16: a result of 8 bits besides, half a unit of which is 0.5 grey levels between 2 and 4 standard deviations."""
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for res in (32, 65):
        for boxes in (None, torch.tensor([[0.0, 0.0, *size], [size[0] / 3, size[1] / 4, size[0] / 2, size[1] / 2]])):
            expected = Resample(size, Preprocess(res=res, **NORMALISED))(pixels, boxes)
            dense = DenseResample(size, Preprocess(res=res, **NORMALISED), dtype=dtype)
            images = dense.apply(pixels, dense.prepare(boxes))
            assert ((images.float() - expected) * LEVELS).abs().max() <= largest
