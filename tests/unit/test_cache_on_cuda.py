"""Batches on a described CUDA device: no driver needed, nothing computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tidali.config import IMAGENET_MEAN, IMAGENET_STD, Augment, Preprocess, Stem
from tidali.loading import batches
from tidali.loading.augment import AUGMENTS, Mix, erase, erase_boxes, mix_batch
from tidali.loading.batches import Batches, Training
from tidali.loading.cache import ANY_SIDE, PixelCache
from tidali.loading.stream import Pixels, Request
from tidali.model.resnet import build_resnet18

EVERYTHING = Augment(
    flip="alternating", shift_px=4, crop_scale=(0.25, 1.0), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, erase=0.25
)


class NoneCorrupt:
    positions: frozenset[int] = frozenset()


def cached_on(device: torch.device, samples: int) -> PixelCache:
    return PixelCache(
        pixels={ANY_SIDE: torch.empty(samples, 64, 64, 3, dtype=torch.uint8, device=device)},
        labels=torch.empty(samples, dtype=torch.int64, device=device),
        identity="fake",
        size=(64, 64),
        corrupt=NoneCorrupt(),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("augment", [*AUGMENTS.values(), EVERYTHING], ids=[*AUGMENTS, "everything"])
@pytest.mark.parametrize(
    ("res", "dtype"), [(64, torch.float32), (224, torch.float32), (224, torch.bfloat16), (128, torch.float16)]
)
def test_every_operation_stays_on_the_device(augment: Augment, res: int, dtype: torch.dtype):
    """Fake tensors refuse any operation on tensors of two devices and any value that the host would have to wait for."""
    with FakeTensorMode():
        device = torch.device("cuda", 0)
        preprocess = Preprocess(res=res, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        loader = Batches(cached_on(device, 1000), preprocess, 256, training=Training(augment=augment), dtype=dtype)
        images, labels = next(loader._rest_of_epoch(0, 0))  # without the side stream, which needs a driver
        assert images.device == labels.device == device
        assert (images.dtype, labels.dtype) == (dtype, torch.int64)
        assert images.shape == (256, 3, res, res)
        assert images.is_contiguous(memory_format=torch.channels_last)
        for mix in (Mix(share=0.3, box=None), Mix(share=0.3, box=(0.2, 0.7))):
            mixed, targets = mix_batch(images, labels, mix, 200)
            assert (mixed.device, targets.device, targets.shape) == (device, device, (256, 200))
        assert erase(images, erase_boxes((res, res), 0.5, labels, seed=0, epoch=0)).device == device


class Streamed:
    """What `ShardSource` gives on a GPU: boxes are asked for on the CPU, pixels come on the GPU."""

    def __init__(self, device: torch.device, samples: int, size: tuple[int, int] | None) -> None:
        self.device, self.order_device, self.size = device, torch.device("cpu"), size
        self.labels = torch.empty(samples, dtype=torch.int64, device=device)
        self.takes_pieces = False
        self.takes_boxes, self.corrupt, self.identity = size is None, NoneCorrupt(), "fake"

    def sizes_of(self, samples: torch.Tensor) -> torch.Tensor:
        return torch.full((len(samples), 2), 300, dtype=torch.int32)

    def read(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Pixels]]:
        for request in requests:
            assert request.samples.device.type == "cpu"
            assert (request.boxes is not None) == self.takes_boxes
            assert request.boxes is None or request.boxes.device.type == "cpu"
            shape = (len(request.samples), *(self.size or (request.side, request.side)), 3)
            stored = torch.empty(shape, dtype=torch.uint8, device=self.device)
            yield request, Pixels(request.samples, stored, None)


@pytest.mark.parametrize("augment", [*AUGMENTS.values(), EVERYTHING], ids=[*AUGMENTS, "everything"])
@pytest.mark.parametrize("size", [(64, 64), None])
@pytest.mark.parametrize(("res", "dtype"), [(64, torch.float32), (128, torch.bfloat16)])
def test_every_operation_on_streamed_pixels_stays_on_the_device(
    augment: Augment, size: tuple[int, int] | None, res: int, dtype: torch.dtype
):
    with FakeTensorMode():
        device = torch.device("cuda", 0)
        preprocess = Preprocess(res=res, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        source = Streamed(device, 1000, size)
        for training in (Training(augment=augment), None):
            loader = Batches(source, preprocess, 256, training=training, dtype=dtype)
            images, labels = next(loader._rest_of_epoch(0, 0))
            assert images.device == labels.device == device
            assert (images.dtype, images.shape) == (dtype, (256, 3, res, res))
            assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize(("dtype", "images_dtype"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_the_forward_pass_and_loss_stay_on_the_device(
    stem: Stem, dtype: torch.dtype, images_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """From the cache through the network under autocast to the loss. Backward asks for a real device: tests/gpu has it."""
    # Without a driver autocast turns itself off with a warning; on the described device it shall do what it does on a real one.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode():
        device = torch.device("cuda", 0)
        preprocess = Preprocess(res=128, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        loader = Batches(cached_on(device, 100), preprocess, 32, training=Training(), dtype=images_dtype)
        images, labels = next(loader._rest_of_epoch(0, 0))
        with device:
            model = build_resnet18(200, stem)
        for parameter in model.parameters():  # what Module.to does, which fails on fake tensors
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", dtype=dtype):
            features = model.relu(model.bn1(model.conv1(images)))
            logits = model(images)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        if dtype == torch.float16:  # of bfloat16 a described device without a driver says that cuDNN cannot convolve it
            assert features.is_contiguous(memory_format=torch.channels_last)
        assert (features.dtype, logits.dtype, loss.dtype) == (dtype, dtype, torch.float32)
        assert (features.device, logits.device, loss.device) == (device, device, device)
        assert logits.shape == (32, 200)


def test_every_epoch_is_prepared_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream's freed memory is kept for it alone, so a new stream each epoch would strand the last one's."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    batches._side_stream.cache_clear()
    first, again, other = (batches._side_stream(torch.device("cuda", index)) for index in (0, 0, 1))
    assert first is again
    assert first is not other
    batches._side_stream.cache_clear()
