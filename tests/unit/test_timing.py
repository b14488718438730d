"""The one reader of the clock, under a clock that the test turns."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

import bench
import shards
import tidali
from tidali.hardware import timing
from tidali.hardware.timing import Lead, Stopwatch, WaitTimer


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(timing, "now_s", self)

    def __call__(self) -> float:
        return self.now_s


def test_stopwatch_starts_at_construction_and_goes_on(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    watch = Stopwatch()
    clock.now_s += 2.5
    assert (watch.peek_s(), watch.elapsed_s()) == (2.5, 2.5)
    clock.now_s += 1.0
    assert watch.elapsed_s() == 3.5


def test_stopwatch_drains_the_device_on_both_sides_and_not_to_peek(monkeypatch) -> None:
    drained: list[torch.device] = []
    monkeypatch.setattr(timing, "synchronize", drained.append)
    device = torch.device("cuda", 1)
    watch = Stopwatch(device)
    assert drained == [device]
    watch.peek_s()
    assert drained == [device]
    watch.elapsed_s()
    assert drained == [device, device]


def test_synchronize_asks_cuda_alone(monkeypatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    timing.synchronize(None)
    timing.synchronize(torch.device("cpu"))
    assert asked == []
    timing.synchronize(torch.device("cuda", 0))
    assert asked == [torch.device("cuda", 0)]


def test_the_host_is_a_few_steps_ahead_of_the_device_at_most(monkeypatch) -> None:
    class Stream:
        recorded = 0

        def record_event(self) -> Event:
            Stream.recorded += 1
            return Event(Stream.recorded)

    class Event:
        def __init__(self, step: int) -> None:
            self.step = step

        def synchronize(self) -> None:
            waited_for.append((Stream.recorded, self.step))

    waited_for: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    lead = Lead(torch.device("cuda", 0), steps=2)
    for _ in range(4):
        lead.step_queued()
    assert waited_for == [(3, 1), (4, 2)]
    for device in (None, torch.device("cpu")):
        Lead(device, steps=0).step_queued()
    assert Stream.recorded == 4


def test_wait_timer_adds_up_what_was_inside(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    wait = WaitTimer()
    for inside_s, outside_s in ((0.5, 7.0), (0.25, 9.0)):
        with wait:
            clock.now_s += inside_s
        clock.now_s += outside_s
    assert wait.total_s == 0.75


def test_no_other_module_reads_the_clock() -> None:
    modules = [path for package in (tidali, shards, bench) for path in Path(package.__path__[0]).rglob("*.py")]
    assert len(modules) > 100
    assert [path for path in modules if _names_taken_from_time(path) - {"sleep"}] == [Path(timing.__file__)]


def _names_taken_from_time(module: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(module.read_text())))
    by_from = {name.name for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "time" for name in node.names}
    owners = [(node.attr, node.value) for node in nodes if isinstance(node, ast.Attribute)]
    return by_from | {attr for attr, owner in owners if isinstance(owner, ast.Name) and owner.id == "time"}
