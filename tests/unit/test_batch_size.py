"""Batch sizes that cannot be trained on: refused in a line whose hint is itself accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidali.config import TrainSettings
from tidali.errors import UsageError
from tidali.recipes import make_recipe
from tidali.training import run_folder
from tidali.training.run_folder import make_run_folder, new_run_folder
from tidali.training.setup import check_batch_size


def settings(batch_size: int, accumulate: int = 1, *, sync_bn: bool = False) -> TrainSettings:
    recipe = make_recipe("modern", batch_size=batch_size, accumulate=accumulate)
    return TrainSettings(data="x", out="y", recipe=recipe, sync_bn=sync_bn)


@given(st.integers(2, 300), st.integers(1, 4), st.integers(0, 200), st.integers(1, 8), st.booleans())
def test_a_hint_passes_its_own_check(batch_size: int, accumulate: int, samples: int, ranks: int, sync_bn: bool) -> None:
    batch_size = max(batch_size, 2 * accumulate)  # what the recipe itself asks for
    given_ = settings(batch_size, accumulate, sync_bn=sync_bn)
    local, part = batch_size // ranks, batch_size // ranks // accumulate
    fits = batch_size % ranks == 0 and batch_size <= samples and (part >= 2 or (sync_bn and part >= 1 and part * ranks >= 2))
    if fits:
        check_batch_size(given_, samples, ranks)
        return
    with pytest.raises(UsageError) as refused:
        check_batch_size(given_, samples, ranks)
    assert "\n" not in str(refused.value)
    hint = re.search(r"use .*--batch-size (\d+)$", str(refused.value))
    assert local >= 0
    if hint is not None:
        check_batch_size(settings(int(hint[1]), accumulate, sync_bn=sync_bn), samples, ranks)
    else:  # no batch size would do
        for other in range(2 * accumulate, samples + 1):
            with pytest.raises(UsageError):
                check_batch_size(settings(other, accumulate, sync_bn=sync_bn), samples, ranks)


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "samples", "ranks", "says"),
    [
        (2, 1, 100, 2, ("--batch-size 2", "2 ranks", "use at least --batch-size 4")),
        (4, 2, 100, 2, ("--batch-size 4", "2 micro-batches", "use at least --batch-size 8")),
        (32, 1, 1, 1, ("'train'", "1 image,", "add images")),
        (32, 1, 3, 2, ("3 images", "2 ranks", "at least 4 images", "fewer ranks")),
        (32, 1, 21, 2, ("--batch-size 32", "21 images", "2 ranks", "use at most --batch-size 20")),
        (33, 1, 100, 2, ("--batch-size 33", "multiple of the 2 ranks", "use --batch-size 32")),
    ],
)
def test_what_is_said(batch_size: int, accumulate: int, samples: int, ranks: int, says: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as refused:
        check_batch_size(settings(batch_size, accumulate), samples, ranks)
    assert all(part in str(refused.value) for part in says)


def test_one_image_of_training_is_one_line(tidali, write_photos, tmp_path: Path) -> None:
    """The hint was --batch-size 1, which is refused too."""
    source = write_photos(tmp_path / "photos", {"train/cat": 1, "val/cat": 2})
    assert tidali("shard", source, tmp_path / "packed", "--workers", 1).code == 0
    ended = tidali("train", "--data", tmp_path / "packed", "--res", 32, "--device", "cpu", "--out", tmp_path / "run")
    assert (ended.code, ended.stderr.count("tidali: ")) == (2, 1)
    assert "add images" in ended.stderr
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------------ run folders


def test_runs_that_start_together_get_a_folder_each(tmp_path: Path) -> None:
    name = str(tmp_path / "runs/x")
    with new_run_folder(name) as first, new_run_folder(name) as second, new_run_folder(name) as third:
        assert [first, second, third] == [name, f"{name}-2", f"{name}-3"]
        for folder in (first, third):
            make_run_folder(Path(folder))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["x", "x-3"]  # the second wrote nothing


def test_a_run_that_does_not_begin_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError), new_run_folder(str(tmp_path / "runs/x")):
        raise UsageError("no")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    with new_run_folder(str(tmp_path / "runs/x")):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # it was there before


def test_of_two_runs_with_one_out_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look before either writes."""
    really = run_folder.Path.iterdir

    def other_begins(folder: Path) -> object:
        found = list(really(folder))
        (folder / "config.json").touch()
        return iter(found)

    monkeypatch.setattr(run_folder.Path, "iterdir", other_begins)
    with pytest.raises(UsageError, match="not empty"):
        make_run_folder(tmp_path / "x")


def test_a_new_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(Exception, match=r"runs/x: cannot be made .*--out") as refused, new_run_folder(str(tmp_path / "runs/x")):
        pass
    assert isinstance(refused.value, run_folder.TidaliError)
