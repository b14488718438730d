"""What `tidali info` prints of data sets that would take long to pack."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tidali.cli.data_output import print_info
from tidali.dataset.contract import ClassName


def manifest(classes: int, **counts: int) -> Any:
    per_class = tuple(range(1, classes + 1))
    split = SimpleNamespace(
        name="train",
        samples=sum(per_class),
        shards=[1],
        size_bytes=10**6,
        class_counts=per_class,
        image_sizes={"64x64": sum(per_class)},
        extensions={"jpg": sum(per_class)},
    )
    return SimpleNamespace(
        classes=[ClassName(id=f"n{label}", name=f"class {label}") for label in range(classes)],
        splits={"train": split},
        source={},
        settings={},
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        counts=counts,
        versions={},
        version=1,
        quarantine=(),
    )


def test_what_was_noticed_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    print_info("data", manifest(2, exif_rotated=4600, grey=1))
    assert "noticed        4,600 turned by EXIF, 1 grey\n" in capsys.readouterr().out


def test_of_very_many_classes_the_smallest_and_the_largest_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    print_info("data", manifest(1000))
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split() for line in lines if line.startswith("class ") and "(n" in line]
    assert [row[-1] for row in listed] == [*map(str, range(1, 11)), *map(str, range(991, 1000)), "1,000"]
    print_info("data", manifest(50))
    assert sum("(n" in line for line in capsys.readouterr().out.splitlines()) == 50


def test_settings_have_thousands_apart(capsys: pytest.CaptureFixture[str]) -> None:
    packed = manifest(2)
    packed.settings = {"seed": 0, "max_pixels": 1 << 26, "kernel": "pil"}
    print_info("data", packed)
    assert "settings       seed 0, max_pixels 67,108,864, kernel pil\n" in capsys.readouterr().out
