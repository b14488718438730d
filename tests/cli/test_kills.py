"""SIGKILL at random steps, then resumed: the weights of the unbroken run, to the bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tidali.config import Augment, CacheChoice, TrainSettings, make_recipe

KILLS = int(os.environ.get("TIDALI_KILLS", "2"))
"""Of one process, a start and a resumption each; two ranks are killed once."""
STEPS = 12  # three epochs of 160 images in batches of 40
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}

# python dies.py STEP ARGUMENTS...: the command, killed by itself after that step's weights and before they can be saved.
DIES = """
import os, signal, sys
from tidali.training import engine
from tidali.cli.main import main
from tidali.errors import TidaliError

step, last_step = engine.train_step, int(sys.argv.pop(1))

def train_step(state, images, targets):
    logits = step(state, images, targets)
    if state.step == last_step and int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        if os.environ.get("FAILS"):
            raise TidaliError("this rank has failed")
        os.kill(os.getpid(), signal.SIGKILL)
    return logits

engine.train_step = train_step
main()
"""


def weights_hash(run: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(run / "last.safetensors").items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def run(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else []), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "cache", "kills"), [(1, "device", (KILLS + 1) // 2), (1, "off", KILLS), (2, "off", 1)])
def test_killed_at_random_steps_and_resumed(
    demo_data: Path, tmp_path: Path, ranks: int, cache: CacheChoice, kills: int
) -> None:
    augment = Augment(flip="alternating", shift_px=4, crop_scale=(0.5, 1.0), brightness=0.2, hue=0.1, erase=0.25)
    settings = TrainSettings(
        data=str(demo_data),
        out="",
        res=32,
        recipe=make_recipe("modern", epochs=3, batch_size=40, augment=augment),
        device="cpu",
        cache=cache,
        deterministic=True,
        checkpoint_minutes=1e-9,  # after each step
    )
    config, dies, whole = tmp_path / "config.json", tmp_path / "dies.py", tmp_path / "whole"
    config.write_text(json.dumps(settings.to_dict()))
    dies.write_text(DIES)

    def train_whole() -> None:
        done = run(ranks, "-m", "tidali", "train", "--config", config, "--out", whole)
        assert done.returncode == 0, done.stderr

    def kill_and_resume(broken: Path, step: int) -> None:
        died = run(ranks, dies, step, "train", "--config", config, "--out", broken)
        assert died.returncode == (-signal.SIGKILL if ranks == 1 else 1), died.stderr
        resumed = run(ranks, "-m", "tidali", "train", "--resume", broken)
        assert resumed.returncode == 0, resumed.stderr
        assert resumed.stderr.count(f"resumed at step {step - 1}") == 1  # what was saved is the step before

    draws = random.Random(ranks)
    killed = {tmp_path / f"broken{number}": draws.randint(1, STEPS) for number in range(kills)}
    with ThreadPoolExecutor(2) as pool:  # of runs of one thread a rank
        for outcome in [pool.submit(train_whole), *(pool.submit(kill_and_resume, *each) for each in killed.items())]:
            outcome.result()

    expected = weights_hash(whole)
    for broken, step in killed.items():
        assert weights_hash(broken) == expected, f"killed at step {step}"
        assert [json.loads(line)["epoch"] for line in (broken / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.mark.slow
def test_a_failed_rank_ends_all_with_its_own_error_shown(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "FAILS", "1")
    (tmp_path / "dies.py").write_text(DIES)
    options = ("--data", demo_data, "--res", 32, "--epochs", 3, "--batch-size", 40, "--device", "cpu")
    ended = run(2, tmp_path / "dies.py", 3, "train", *options, "--out", tmp_path / "out")
    assert ended.returncode == 1
    assert ended.stderr.count("tidali: this rank has failed\n") == 1
    assert "broadcast_buffers" not in ended.stderr
    assert (tmp_path / "out" / "state.safetensors").exists()
    assert not (tmp_path / "out" / "summary.json").exists()
