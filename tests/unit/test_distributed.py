"""Two gloo ranks against a plain loop in one process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tidali import console
from tidali.config import Preprocess
from tidali.dataset.contract import open_dataset
from tidali.errors import Interrupted, TidaliError
from tidali.hardware import ranks as distributed_module
from tidali.hardware.ranks import Ranks, joined_ranks
from tidali.loading.cache import ANY_SIDE, PixelCache
from tidali.loading.data import Data
from tidali.loading.samples import SampleTable
from tidali.loading.sharing import Sharing
from tidali.model.resnet import build_resnet18
from tidali.training.agreement import steps_between_agreements

STEPS = 6
HALVES = {torch.float64: (2, 64), torch.float32: (2, 100)}
"""A rank's images and their side: at 64 px `tidali.hardware.cpu_convolution` adds up in another order than the plain loop,
which float32's last bit makes visible (tests/unit/test_engine.py)."""
LR, DECAY = 1e-3, 5e-4

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the way that each weight went. With one thread on both sides no bit differed in either; with two against one, the sums
have another order, and at ten times this learning rate batch norm over eight images made 0.7 of a last bit of float32."""

RANK = """
import sys
import pytest
import torch
from safetensors.torch import save_file
from tidali.recipes import make_recipe
from tidali.hardware.device import plan_device
from tidali.hardware.ranks import joined_ranks
from tidali.training.engine import make_train_state, train_step
from tidali.model.resnet import build_resnet18
from tests.unit.test_distributed import DECAY, HALVES, LR, STEPS, global_batch, save_shared_cache

with joined_ranks("cpu") as ranks:
    save_shared_cache(ranks, sys.argv[1])
    assert ranks.gather({"rank": ranks.rank}) == [{"rank": 0}, {"rank": 1}]
    for dtype, (half, _) in HALVES.items():
        torch.manual_seed(ranks.rank)  # other weights on each rank: rank 0's must win
        state = make_train_state(
            build_resnet18(10, "imagenet").to(dtype),
            plan_device("cpu", "off", "off"),
            lambda step: LR,
            make_recipe("modern", weight_decay=DECAY, ema_decay=0.0),
            ranks=ranks,
        )
        for step in range(STEPS):
            images, labels = global_batch(step, dtype)
            part = slice(ranks.rank * half, (ranks.rank + 1) * half)
            train_step(state, images[part], labels[part])
        found = {name: tensor.contiguous() for name, tensor in state.model.state_dict().items()}
        save_file(found, f"{sys.argv[1]}/{dtype}-{ranks.rank}")
"""


def save_shared_cache(ranks: Ranks, folder: str) -> None:
    """What this rank decodes for the cache and finds in it. Then rank 0 changes a byte, which both have to see."""
    asked, expect = [], SampleTable.expect
    with mock.patch.object(SampleTable, "expect", lambda table, samples: asked.extend(samples) or expect(table, samples)):
        data = Data(open_dataset(Path(folder) / "data"), torch.device("cpu"), cache="device", max_bad=1, ranks=ranks)
        cache = data.batches("val", Preprocess(res=64), 8).source
    assert isinstance(cache, PixelCache)
    pixels = cache.pixels[ANY_SIDE]
    found = {"pixels": pixels.clone(), "asked": torch.tensor(asked), "corrupt": torch.tensor(sorted(data.corrupt("val")))}
    ranks.gather(None)
    if ranks.is_main:
        pixels[-1, -1, -1, -1] ^= 255
    ranks.gather(None)
    found["changed"] = pixels.clone()
    found["sent"] = torch.zeros(5, dtype=torch.uint8)  # as it is between GPUs
    sharing = Sharing.of(ranks)
    found["sent"][sharing.part(5)] = 1 + ranks.rank
    sharing.broadcast(found["sent"])
    save_file(found, f"{folder}/cache-{ranks.rank}")


def global_batch(step: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    half, side = HALVES[dtype]
    images = torch.randn(2 * half, 3, side, side, generator=generator, dtype=torch.float64).to(dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (2 * half,), generator=generator)


@pytest.mark.slow
def test_two_ranks_fill_one_cache_and_are_a_loop_that_averages_the_halves_gradients(
    tmp_path: Path, demo_data: Path, replace_bytes: Callable[..., str], upright: Callable[..., Any], one_thread: None
) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    shutil.copytree(demo_data, tmp_path / "data")
    replace_bytes(tmp_path / "data", "val", 20, 100, b"tidali")  # in the second rank's half
    root = Path(__file__).resolve().parents[2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher = subprocess.Popen(
        [*torchrun, str(tmp_path / "rank.py"), str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    plain = {dtype: plain_loop(dtype) for dtype in HALVES}
    _, said = launcher.communicate()
    assert launcher.returncode == 0, said[-2000:]
    assert said.count("left out, corrupt") == 1
    expected = torch.tensor(np.array([pixels for pixels, _, _ in upright(open_dataset(demo_data), "val")]))
    expected[20] = 0
    caches = [load_file(tmp_path / f"cache-{rank}") for rank in range(2)]
    for rank, cache in enumerate(caches):
        assert torch.equal(cache["pixels"], expected)
        assert set(cache["asked"].tolist()) == set(range(16 * rank, 16 * rank + 16))
        assert cache["corrupt"].tolist() == [20]
        assert cache["sent"].tolist() == [1, 1, 2, 2, 2]
        assert torch.equal(cache["changed"], caches[0]["changed"])
        assert not torch.equal(cache["changed"], expected)
    for dtype, (start, model) in plain.items():
        found = [load_file(tmp_path / f"{dtype}-{rank}") for rank in range(2)]
        for name, parameter in model.named_parameters():
            assert torch.equal(found[0][name], found[1][name])
            moved = (parameter - start[name]).norm()
            assert moved > 0
            assert (found[0][name] - parameter).norm() <= TOLERANCE[dtype] * moved, name
        assert not torch.equal(found[0]["bn1.running_mean"], found[1]["bn1.running_mean"])  # each rank's own


def plain_loop(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
    """The parameters that it began with, and the trained model."""
    torch.manual_seed(0)
    model = build_resnet18(10, "imagenet").to(dtype, memory_format=torch.channels_last)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.9, nesterov=True)
    model.train()
    half, _ = HALVES[dtype]
    for step in range(STEPS):
        images, labels = global_batch(step, dtype)
        optimizer.zero_grad()
        for part in (slice(0, half), slice(half, 2 * half)):  # batch norm sees each half by itself
            loss = torch.nn.functional.cross_entropy(model(images[part]).float(), labels[part], label_smoothing=0.1)
            (loss / 2).backward()
        optimizer.step()
    return start, model


def test_ranks_ask_each_other_often_enough_for_torchruns_30_seconds() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert steps_between_agreements(4.0, cpu) == steps_between_agreements(0.01, cpu) == 1
    assert [steps_between_agreements(step_s, gpu) for step_s in (4.0, 0.5, 0.2, 0.01, 0.0)] == [1, 4, 10, 20, 20]


@pytest.mark.parametrize(("rank", "talks"), [("0", True), ("1", False)])
def test_one_rank_talks_for_all(monkeypatch: pytest.MonkeyPatch, capsys, rank: str, talks: bool) -> None:
    monkeypatch.setenv("RANK", rank)
    console.say("a message")
    console.warn("a warning")
    assert ("a message" in capsys.readouterr().err) is talks


class FakeGroup:
    """What `joined_ranks` asks of torch.distributed, written down."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    DistError = torch.distributed.DistError

    def init_process_group(self, backend: str, timeout: timedelta) -> None:
        self.calls.append(backend)

    def destroy_process_group(self) -> None:
        self.calls.append("left")


@pytest.mark.parametrize(
    ("error", "calls"),
    [(None, ["gloo", "left"]), (Interrupted("stopped", 15), ["gloo", "left"]), (TidaliError("failed"), ["gloo"])],
    ids=["done", "stopped", "failed"],
)
def test_a_rank_that_failed_does_not_wait_for_the_others(
    monkeypatch: pytest.MonkeyPatch, error: TidaliError | None, calls: list[str]
) -> None:
    group = FakeGroup()
    monkeypatch.setattr(distributed_module, "distributed", group)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(TidaliError) if error is not None else nullcontext(), joined_ranks("cpu"):
        if error is not None:
            raise error
    assert group.calls == calls


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../gloo/tcp/pair.cc:545] Read error [127.0.0.1]:6793: Connection reset by peer. This is typically ..."),
        torch.distributed.DistNetworkError("Failed to recv, got 0 bytes\nException raised from ..."),
    ],
    ids=["gloo", "store"],
)
def test_a_rank_that_lost_another_ends_with_one_line(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    group = FakeGroup()
    monkeypatch.setattr(distributed_module, "distributed", group)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with (
        pytest.raises(
            TidaliError,
            match=r"^rank 1 lost .* \((Read error \S+ Connection reset by peer|Failed .* 0 bytes)\); start .*--resume$",
        ) as raised,
        joined_ranks("cpu"),
    ):
        raise error
    assert "\n" not in str(raised.value)
    with pytest.raises(RuntimeError, match="shape"), joined_ranks("cpu"):
        raise RuntimeError("shape '[2]' is invalid")
    assert group.calls == ["gloo", "gloo"]
