"""Several ranks that are stopped, and what may be given with ``--resume``; tests/cli/test_kills.py has what is resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tidali.config import TrainSettings
from tidali.dataset.contract import open_dataset
from tidali.hardware.device import plan_device
from tidali.hardware.ranks import Ranks
from tidali.recipes import make_recipe
from tidali.training.setup import set_up

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.mark.slow
def test_torchrun_is_stopped_at_once_and_one_rank_says_so(demo_data: Path, tmp_path: Path) -> None:
    """Its workers have 30 seconds to save, and are killed then."""
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tidali"]
    options = ["--res", "32", "--epochs", "500", "--batch-size", "40", "--device", "cpu", "--out", str(out)]
    command = [*launcher, "train", "--data", str(demo_data), *options]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (out / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert said.count("stopping after this step and saving") == 1, said
    assert said.count("tidali: stopped at step ") == 1, said
    assert (out / "state.safetensors").exists()


def wait_for(condition, process: subprocess.Popen) -> None:
    """Until it holds; fails if the process ends first."""
    while not condition():
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.02)


def test_a_stream_that_is_resumed_says_why_it_streams(demo_data: Path) -> None:
    """Nobody asked for ``--cache off``: memory was short when the run began, and may no longer be."""
    settings = TrainSettings(data=str(demo_data), out="", res=32, recipe=make_recipe("seed", epochs=1), device="cpu")
    prepared = set_up(settings, open_dataset(demo_data), plan_device("cpu", "off", "off"), Ranks(), cache="off")
    route = prepared.train_batches.route
    assert (route.cached, route.reason) == (False, "as when the run began")


def test_resume_takes_no_other_option(tidali, tmp_path: Path) -> None:
    ended = tidali("train", "--resume", tmp_path, "--epochs", 3)
    assert ended.code == 2
    assert "--epochs" in ended.stderr


def test_resume_of_no_run(tidali, tmp_path: Path) -> None:
    ended = tidali("train", "--resume", tmp_path)
    assert ended.code == 2
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.slow
def test_ranks_evaluate_to_the_same_figures(tidali, trained, demo_data: Path) -> None:
    """Three gloo ranks, one with fewer images, against one process: the same hits, to the sample. The loss adds up in another
    order, so to 1e-6."""
    evaluate = ("eval", str(trained[0]), "--data", str(demo_data), "--cache", "off", "--json")
    one = tidali(*evaluate)
    assert one.code == 0, one.stderr
    expected = json.loads(one.stdout)["scores"][0]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "tidali"]
    done = subprocess.run([*launcher, *evaluate], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)["scores"][0]
    assert score["samples"] == expected["samples"] == 32
    assert score["top1_percent"] == expected["top1_percent"]
    assert score["top5_percent"] == expected["top5_percent"]
    assert score["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert score["classes"] == expected["classes"]
    assert [one["key"] for one in score["confident_mistakes"]] == [one["key"] for one in expected["confident_mistakes"]]
