"""SIGTERM and SIGKILL at random steps, then resumed: the weights of the unbroken run, to the bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tidali.config import Augment, CacheChoice, DeviceChoice, TrainSettings
from tidali.model.resnet import build_resnet18
from tidali.recipes import make_recipe

KILLS = int(os.environ.get("TIDALI_KILLS", "1"))
"""Runs of one process with each cache, each killed once; two ranks are killed once."""
STEPS = 8  # two epochs of 160 images in batches of 40
ON_GPU = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
ENVIRONMENT = {**ON_GPU, "CUDA_VISIBLE_DEVICES": ""}

# python dies.py STEP ARGUMENTS...: the command; it sends itself SIGKILL, or the signal in the environment, after that step's
# weights and before they can be saved.
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
        os.kill(os.getpid(), int(os.environ.get("SIGNAL", signal.SIGKILL)))
    return logits

engine.train_step = train_step
main()
"""


def weights_hash(run: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(run / "last.safetensors").items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def run(ranks: int, *arguments: object, on_gpu: bool = False) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else []), *map(str, arguments)]
    environment = ON_GPU if on_gpu else ENVIRONMENT
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def write_configs(
    folder: Path, data: Path, cache: CacheChoice, device: DeviceChoice = "cpu", init: str = "none", **recipe: object
) -> tuple[Path, Path]:
    """Of a run that is not disturbed, and of one that saves its state after each step, to be killed."""
    augment = Augment(flip="alternating", shift_px=4, crop_scale=(0.5, 1.0), brightness=0.2, hue=0.1, erase=0.25)
    settings = TrainSettings(
        data=str(data),
        out="",
        res=32,
        init=init,
        recipe=make_recipe("modern", epochs=2, batch_size=40, augment=augment, **recipe),
        device=device,
        cache=cache,
        deterministic=True,
    )
    (folder / "dies.py").write_text(DIES)
    whole, dies = folder / "whole.json", folder / "dies.json"
    whole.write_text(json.dumps(settings.to_dict()))
    dies.write_text(json.dumps(replace(settings, checkpoint_minutes=1e-9).to_dict()))
    return whole, dies


def check_same_run(whole: Path, broken: Path, step: int) -> None:
    assert weights_hash(broken) == weights_hash(whole), f"killed at step {step}"
    assert [json.loads(line)["epoch"] for line in (broken / "metrics.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "stopped"), [("device", False), ("off", True)], ids=["device", "off, stopped before"])
def test_killed_at_random_steps_and_resumed(
    tidali,
    demo_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache: CacheChoice,
    stopped: bool,
    one_thread: None,
) -> None:
    """One of them is stopped by SIGTERM first, and killed after it was resumed."""
    undisturbed, killed = write_configs(tmp_path, demo_data, cache)
    whole = tmp_path / "whole"
    ended = tidali("train", "--config", undisturbed, "--out", whole)
    assert ended.code == 0, ended.stderr
    draws = random.Random(cache)
    for number in range(KILLS):
        stop, step = sorted(draws.sample(range(1, STEPS + 1), 2))
        broken = tmp_path / f"broken{number}"
        command: tuple[object, ...] = ("train", "--config", killed, "--out", broken)
        if stopped:
            monkeypatch.setitem(ENVIRONMENT, "SIGNAL", str(int(signal.SIGTERM)))
            ended = run(1, tmp_path / "dies.py", stop, *command)
            assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
            last_line = ended.stderr.splitlines()[-1]
            assert last_line == f"tidali: stopped at step {stop}; resume with 'tidali train --resume {broken}'"
            monkeypatch.delitem(ENVIRONMENT, "SIGNAL")
            command = ("train", "--resume", broken)
        died = run(1, tmp_path / "dies.py", step, *command)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert died.stderr.count(f"resumed at step {stop}") == stopped
        resumed = tidali("train", "--resume", broken)
        assert resumed.code == 0, resumed.stderr
        assert resumed.stderr.count(f"resumed at step {step - 1}") == 1  # what was saved is the step before
        check_same_run(whole, broken, step)


@pytest.mark.slow
def test_two_ranks_killed_and_resumed(demo_data: Path, tmp_path: Path) -> None:
    """The stem and the first stage keep their weights, and the others learn at rates of their own."""
    start = build_resnet18(4, "imagenet").state_dict()
    torch.save(start, tmp_path / "start.pth")
    parts = dict(freeze="layer1", head_lr_scale=10.0, stage_lr_decay=0.5)
    undisturbed, killed = write_configs(tmp_path, demo_data, "off", init=str(tmp_path / "start.pth"), **parts)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    step = random.Random(2).randint(1, STEPS)
    ended = run(2, "-m", "tidali", "train", "--config", undisturbed, "--out", whole)
    assert ended.returncode == 0, ended.stderr
    died = run(2, tmp_path / "dies.py", step, "train", "--config", killed, "--out", broken)
    assert died.returncode == 1, died.stderr
    resumed = run(2, "-m", "tidali", "train", "--resume", broken)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count(f"resumed at step {step - 1}") == 1
    check_same_run(whole, broken, step)
    ended_with = load_file(whole / "last.safetensors")
    kept = {name for name in start if torch.equal(ended_with[name], start[name])}
    assert {name for name in kept if "num_batches" not in name} == {
        name for name in start if name.startswith(("conv1", "bn1", "layer1")) and "num_batches" not in name
    }


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
