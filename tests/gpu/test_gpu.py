"""The same graph, step and evaluation on CUDA. Run where there is a GPU: ``pytest tests/gpu``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tidali.contract import Dataset, open_dataset
from tidali.device import plan_device
from tidali.engine import TrainState, evaluate, make_train_state, train_step
from tidali.loader import StreamBatches
from tidali.models import build_resnet18

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch")

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def dataset(demo_data: Path) -> Dataset:
    return open_dataset(demo_data)


def make_state(amp: str, compile: str = "off") -> TrainState:
    torch.manual_seed(0)
    return make_train_state(
        build_resnet18(4, "imagenet"),
        plan_device("cuda", amp, compile),
        lambda step: 0.01,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        label_smoothing=0.1,
    )


def one_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 64, 64, generator=generator).to(CUDA, memory_format=torch.channels_last)
    return images, torch.randint(4, (16,), generator=generator).to(CUDA)


@pytest.mark.parametrize("res", [64, 96])
def test_gpu_batches_are_the_cpus(dataset: Dataset, res: int) -> None:
    on_cpu = list(StreamBatches(dataset, "val", res=res, batch_size=20))
    on_gpu = list(StreamBatches(dataset, "val", res=res, batch_size=20, device=CUDA))
    assert len(on_gpu) == len(on_cpu) == 2
    for (images, labels), (expected, expected_labels) in zip(on_gpu, on_cpu, strict=True):
        assert images.device == labels.device == CUDA
        assert images.dtype is torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels.cpu(), expected_labels)
        grey_levels = 255 * (images.cpu() - expected).abs().flatten()
        # nvJPEG and libjpeg-turbo round their inverse DCT and colour conversion differently, by one or two grey levels; the
        # resize spreads that. These bounds are judged from there: not measured on a GPU yet.
        largest, mean = grey_levels.max().item(), grey_levels.mean().item()
        assert mean <= 1, f"largest {largest:.2f}, mean {mean:.3f}"
        assert (grey_levels <= 4).float().mean() >= 0.999, f"largest {largest:.2f}, mean {mean:.3f}"


def test_training_batches_cover_an_epoch(dataset: Dataset) -> None:
    batches = StreamBatches(dataset, "train", res=64, batch_size=40, train=True, flip=True, device=CUDA)
    for _ in range(2):
        labels = torch.cat([labels for _, labels in batches])
        assert torch.bincount(labels).tolist() == [40, 40, 40, 40]


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("off", torch.float32)])
def test_steps_in_each_precision_lower_the_loss(amp: str, dtype: torch.dtype) -> None:
    if amp == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")
    state = make_state(amp)
    images, labels = one_batch()
    losses = []
    for _ in range(15):
        logits = train_step(state, images, labels)
        losses.append(torch.nn.functional.cross_entropy(logits.float(), labels).item())
    assert logits.dtype is dtype
    assert losses[-1] < 0.5 * losses[0]
    assert {parameter.dtype for parameter in state.model.parameters()} == {torch.float32}
    assert state.scaler.is_enabled() == (amp == "fp16")


def test_compiled_forward_is_eagers() -> None:
    state = make_state("off", compile="on")
    images, _ = one_batch()
    state.model.eval()
    with torch.inference_mode():
        eager, compiled = state.model(images), state.forward(images)
    assert state.forward is not state.model
    # float32 throughout, but fused kernels sum in another order over 18 layers.
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)


def test_evaluation_counts_every_sample(dataset: Dataset) -> None:
    plan = plan_device("cuda", "auto", "off")
    state = make_state("auto")
    scores = [
        evaluate(
            state.model,
            StreamBatches(dataset, "val", res=64, batch_size=batch_size, device=CUDA),
            plan,
            expected_samples=32,
        )
        for batch_size in (10, 32)
    ]
    assert [score.samples for score in scores] == [32, 32]
    # Half precision's products depend on how the batch is cut, by far less than one sample's loss.
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-2)


@pytest.mark.parametrize("cache", ["off", "device"])
def test_train_then_eval_agree(tidali, demo_data: Path, tmp_path: Path, cache: str) -> None:
    out = tmp_path / "run"
    ended = tidali(
        *("train", "--data", demo_data, "--res", 64, "--epochs", 2, "--batch-size", 40),
        *("--device", "cuda", "--compile", "off", "--cache", cache, "--out", out),
    )
    assert ended.code == 0, ended.stderr
    best = json.loads((out / "summary.json").read_text())["best"]
    ended = tidali("eval", out, "--data", demo_data, "--device", "cuda", "--cache", cache, "--json")
    assert ended.code == 0, ended.stderr
    (score,) = json.loads(ended.stdout)["scores"]
    assert (score["samples"], score["top1_percent"]) == (32, best["top1_percent"])
