from __future__ import annotations

import os

import pytest

from tidali.hardware.cpu_threads import WAITING, wait_briefly


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, WAITING),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        ({"OMP_WAIT_POLICY": "passive"}, {"OMP_WAIT_POLICY": "passive"}),
    ],
)
def test_what_its_user_has_said_stays(monkeypatch, before: dict[str, str], after: dict[str, str]) -> None:
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    wait_briefly()
    assert {name: os.environ[name] for name in WAITING if name in os.environ} == after
