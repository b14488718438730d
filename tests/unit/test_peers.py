"""``tidali bench peers``: which cases there are, how a failing one is reported, and that a case doing other work is refused."""

from __future__ import annotations

import functools
import importlib
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from bench import case_process, crops, measure, peer_env, peer_loaders, peers
from bench.case_worker import DataJob, Stream
from bench.peer_check import why_wrong_form, why_wrong_loader, why_wrong_training
from bench.peer_env import Environment, PeerMissing, python_of, what_failed
from bench.peer_table import LOADERS, REFERENCE, TRAINING, Peer, chosen
from tidali.dataset.contract import open_dataset
from tidali.errors import UsageError

# ------------------------------------------------------------------------------------------------------------------ the tables


@pytest.mark.parametrize("table", [LOADERS, TRAINING])
def test_every_case_has_a_function_and_an_environment(table: tuple[Peer, ...]) -> None:
    assert len({peer.id for peer in table}) == len({peer.name for peer in table}) == len(table)
    for peer in (*table, REFERENCE):
        module, _, name = peer.target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        assert peer.env is None or peer.env in peer_env.ENVIRONMENTS
        assert peer is REFERENCE or peer.base in {other.id for other in table}


def test_a_name_chooses_a_case_or_a_family() -> None:
    ids = [peer.id for peer in chosen(LOADERS, ["spdl", "ffcv", "torchvision-v2"])]
    assert ids == ["torchvision-v2", "ffcv-raw", "ffcv-jpg", "ffcv-jpg-400", "spdl"]  # in the table's order
    assert chosen(LOADERS, None) == LOADERS
    assert [peer.id for peer in chosen(TRAINING, ["timm"])] == ["timm-step", "timm-loop"]


@pytest.mark.parametrize("name", ["tensorflow", "", "torch", "ffcv-"])
def test_an_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(UsageError, match=rf"--peers {name}: choose from torchvision-v1, .*, tidali-cached-bf16"):
        chosen(LOADERS, ["spdl", name])


# ---------------------------------------------------------------------------------------------------------------- the check

CLASSES, RES, BATCH, SAMPLES = 4, 8, 8, 60


def make_job(**changes: Any) -> DataJob:
    settings: dict[str, Any] = dict(
        target="",
        package="torch",
        root="",
        folder="",
        scratch="",
        res=RES,
        batch_size=BATCH,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        classes=CLASSES,
        samples=SAMPLES,
        as_stored=True,
        cores=1,
    )
    return DataJob(**{**settings, **changes})


def make_batches(
    change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = lambda x, y: (x, y),
    samples: int = SAMPLES,
    batch_size: int = BATCH,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Noise around a colour a class, of mean 0 and deviation about 1, in class order."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % CLASSES
    colours = torch.tensor([[1.0, 0, -1], [-1, 1, 0], [0, -1, 1], [0, 0, 0]])
    images = 0.8 * torch.randn(samples, 3, RES, RES, generator=generator) + colours[labels][:, :, None, None]
    return [change(images[n : n + batch_size], labels[n : n + batch_size]) for n in range(0, samples, batch_size)]


def facts_of(batches: list[Any], limit: int | None = None) -> dict[str, Any]:
    return Stream(batches, make_job()).check(limit)


REFERENCE_FACTS = facts_of(make_batches(samples=60))


def verdict(facts: dict[str, Any], *, whole: bool = True, carried_over: int = 0) -> str | None:
    return why_wrong_loader(facts, REFERENCE_FACTS, make_job(), whole=whole, carried_over=carried_over)


def test_the_same_images_in_any_order_and_layout_pass() -> None:
    assert verdict(REFERENCE_FACTS) is None
    flipped = make_batches(lambda x, y: (x.flip(3).to(memory_format=torch.channels_last), y[:, None].int()))
    assert verdict(facts_of(flipped[::-1])) is None
    assert verdict(facts_of(make_batches(lambda x, y: (x.bfloat16(), y)))) is None


def test_a_dropped_last_batch_passes_and_more_does_not() -> None:
    batches = make_batches()
    assert verdict(facts_of(batches[:-1])) is None  # 56 of 60
    assert verdict(facts_of(batches[:-2])) == "an epoch has 48 of the 60 samples"
    assert verdict(facts_of(batches[:-2]), whole=False) is None
    assert verdict(facts_of([])) == "it returns no batch"


def test_samples_of_the_next_epoch_pass_where_a_buffer_explains_them() -> None:
    twice = facts_of([*make_batches(), make_batches()[0]])
    assert verdict(twice) == "8 of its labels are not in the train split"
    assert verdict(twice, carried_over=8) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, y: (x, (y + 1) % CLASSES), "its labels are not those of its images"),
        (lambda x, y: (x, torch.zeros_like(y)), "45 of its labels are not in the train split"),
        (lambda x, y: (x, y + CLASSES), "60 of its labels belong to no class"),
        (lambda x, y: (x, torch.where(y == 0, -1, y)), "15 of its labels belong to no class"),
        (lambda x, y: (x.flip(1), y), "its labels are not those of its images"),  # BGR
        (lambda x, y: (x + 0.5, y), "the mean of its pixels is 0.49, not -0.01"),
        (lambda x, y: (x / 0.25, y), "the standard deviation of its pixels is"),
        (lambda x, y: (x[:, :, :-1], y), r"its images have shape \[\(3, 7, 8\)\], not \(3, 8, 8\)"),
        (lambda x, y: (x.permute(0, 2, 3, 1).contiguous(), y), r"its images have shape \[\(8, 8, 3\)\]"),
        (lambda x, y: ((x * 50).to(torch.uint8), y), "its images are uint8, not floating-point"),
    ],
)
def test_other_work_is_refused(change: Callable[..., Any], reason: str) -> None:
    said = verdict(facts_of(make_batches(change)))
    assert said is not None
    assert re.match(reason, said)


def test_a_stream_continues_after_an_epoch_and_never_uses_an_iterator_that_has_ended() -> None:
    class Once:
        """FFCV's iterators wait for ever when they are used again."""

        def __iter__(self) -> Iterator[Any]:
            return iter(OnceIterator())

    class OnceIterator:
        def __init__(self) -> None:
            self.left, self.ended = [5, 3], False

        def __iter__(self) -> OnceIterator:
            return self

        def __next__(self) -> Any:
            assert not self.ended
            if not self.left:
                self.ended = True
                raise StopIteration
            count = self.left.pop(0)
            return torch.zeros(count, 3, RES, RES), torch.zeros(count)

    stream = Stream(Once(), make_job())
    assert sum(stream.check(None)["counts"]) == 8
    assert [stream.step() for _ in range(5)] == [5, 3, 5, 3, 5]
    with pytest.raises(RuntimeError, match="returns no batch"):
        Stream([], make_job()).step()


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"loss": 1.5, "images": BATCH, "shape": [3, RES, RES]}, None),
        ({"loss": 2.5, "images": BATCH, "shape": [3, RES, RES]}, "its first loss is 2.50; guessing has 1.39"),
        ({"loss": float("nan"), "images": BATCH, "shape": [3, RES, RES]}, "its first loss is nan; guessing has 1.39"),
        ({"loss": 1.5, "images": 4, "shape": [3, RES, RES]}, "its batch is 4 images of [3, 8, 8]"),
    ],
)
def test_a_training_step_starts_by_guessing(facts: dict[str, Any], reason: str | None) -> None:
    assert why_wrong_training(facts, make_job()) == reason


# -------------------------------------------------------------------------------------------------------------- environments


@pytest.fixture
def peers_home(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tidali" / "peers"


def write_wheel(folder: Path) -> Path:
    """A distribution of one module, which needs torch, as pip takes it without a network."""
    wheel = folder / "a_peer-1.0-py3-none-any.whl"
    info = "a_peer-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as out:
        out.writestr("a_peer.py", "import torch\nWHERE = torch.__file__\n")
        out.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: a-peer\nVersion: 1.0\nRequires-Dist: torch\n")
        out.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr(f"{info}/RECORD", f"a_peer.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return wheel


@pytest.mark.slow
def test_an_environment_has_the_peer_and_this_torch_and_is_kept(peers_home: Path, monkeypatch, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path)
    monkeypatch.setitem(peer_env.ENVIRONMENTS, "a", Environment(requirements=(str(wheel),)))
    python = python_of("a")
    assert python.is_relative_to(peers_home)
    assert list(peers_home.glob("**/torch")) == []
    done = subprocess.run([python, "-c", "import a_peer; print(a_peer.WHERE)"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == torch.__file__

    made = (peers_home / "a" / "made.json").stat().st_mtime_ns
    assert python_of("a") == python
    assert (peers_home / "a" / "made.json").stat().st_mtime_ns == made
    monkeypatch.setitem(peer_env.ENVIRONMENTS, "a", Environment(requirements=(str(tmp_path / "gone-1.0-py3-none-any.whl"),)))
    with pytest.raises(PeerMissing, match="cannot be installed"):  # other requirements: it is created again
        python_of("a")


@pytest.mark.slow
def test_a_failed_installation_has_its_reason_and_the_way_out(peers_home: Path, monkeypatch, tmp_path: Path) -> None:
    gone = tmp_path / "gone-1.0-py3-none-any.whl"
    monkeypatch.setitem(peer_env.ENVIRONMENTS, "b", Environment(requirements=(str(gone),), hint="get it from the shelf"))
    for _ in range(2):  # a failed installation is not used as an environment
        with pytest.raises(PeerMissing, match=r"cannot be installed: .*gone-1\.0.* \(log: .*b\.log\); get it from the shelf$"):
            python_of("b")


def test_what_failed_finds_the_exception_in_pips_output() -> None:
    log = """
      Traceback (most recent call last):
        File "<string>", line 2, in <module>
      ValueError: Could not find required package: opencv4.
      [end of output]
    note: This error originates from a subprocess, and is likely not a problem with pip.
    ERROR: Failed to build ffcv
    """
    assert what_failed(log) == "ValueError: Could not find required package: opencv4."
    assert what_failed("Looking\nERROR: No matching distribution found for x\nERROR: other") == (
        "No matching distribution found for x"
    )
    assert what_failed("one\ntwo\n") == "two"
    assert what_failed("") == "no output"


# -------------------------------------------------------------------------------------------------------------- the whole run

LIAR = """
import torch
from bench.peer_loaders import torchvision_v1


class Shifted:
    def __init__(self, job):
        self.batches, self.classes = torchvision_v1(job), job.classes

    def __iter__(self):
        for images, labels in self.batches:
            yield images, (labels + 1) % self.classes


def shifted(job):
    return Shifted(job)
"""
ABSENT = """
def absent(job):
    import a_package_that_is_not_there
"""


@pytest.mark.slow
def test_rows_of_cases_that_run_lie_or_cannot_be_had(monkeypatch, demo_data: Path, tmp_path: Path, peers_home: Path) -> None:
    (tmp_path / "liar.py").write_text(LIAR)
    (tmp_path / "absent.py").write_text(ABSENT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(peer_env.ENVIRONMENTS, "gone", Environment(requirements=("gone",)))

    def cannot(name: str) -> Path:
        raise PeerMissing(f"{name} cannot be installed: no such distribution")

    monkeypatch.setattr(peer_env, "python_of", cannot)
    table = (
        LOADERS[0],
        Peer(id="shifted", name="shifted", target="liar:shifted", package="torch"),
        Peer(id="absent", name="absent", target="absent:absent", package="torch", hint="find it"),
        Peer(id="gone", name="gone", target="liar:shifted", package="torch", env="gone"),
        Peer(id="tidali-cached", name="tidali cached", target="bench.peer_loaders:tidali_cached", package="tidali"),
    )
    monkeypatch.setattr(peers, "LOADERS", table)
    monkeypatch.setattr(case_process, "MIN_SECONDS", 0.1)
    monkeypatch.setattr(measure, "MIN_SECONDS", 0.0)  # of the ceilings
    document = peers.bench_peers(open_dataset(demo_data), resolutions=[32], batch_size=8, repeats=1, peers=None)
    assert (document["benchmark"], document["repeats"], document["batch_size"]) == ("peers", 1, 8)
    rows = {row["case"]: row for row in document["rows"]}
    assert list(rows) == [peer.name for peer in table]
    assert rows["torchvision v1"]["times_torchvision"] == 1.0
    rate = rows["tidali cached"]["images_per_s"]
    assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    base = rows["torchvision v1"]["images_per_s"]["median"]
    assert rows["tidali cached"]["times_torchvision"] == pytest.approx(rate["median"] / base)
    assert rows["shifted"] == {"res": 32, "case": "shifted", "not_run": "its labels are not those of its images"}
    assert rows["absent"]["not_run"] == "ModuleNotFoundError: No module named 'a_package_that_is_not_there'; find it"
    assert rows["gone"]["not_run"] == "gone cannot be installed: no such distribution"
    assert document["peer_versions"]["torchvision"]

    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    jsonschema.validate(json.loads(json.dumps(document)), json.loads((Path(peers.__file__).parent / "schema.json").read_text()))


def test_spdl_fails_at_once_where_it_cannot_decode(monkeypatch, tmp_path: Path) -> None:
    """Its pipeline leaves out what fails, so an epoch would only be empty."""

    def without_ffmpeg(*paths: Any, **options: Any) -> None:
        raise RuntimeError("Failed to import libspdl")

    io = SimpleNamespace(get_video_filter_desc=lambda **options: "", load_image_batch=without_ffmpeg)
    for name, module in (
        ("spdl", SimpleNamespace(io=io)),
        ("spdl.io", io),
        ("spdl.pipeline", SimpleNamespace(PipelineBuilder=0)),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peer_loaders, "files_of", lambda job: [(str(tmp_path / "a.jpg"), 0)])
    with pytest.raises(RuntimeError, match="Failed to import libspdl"):
        peer_loaders.spdl(make_job())


def test_a_batch_larger_than_the_split_is_refused(demo_data: Path) -> None:
    with pytest.raises(UsageError, match="--batch-size 161: the train split has 160 samples"):
        peers.bench_peers(open_dataset(demo_data), resolutions=[32], batch_size=161, repeats=1, peers=["tidali"])


# --------------------------------------------------------------------------------------------------------------- random crops

CROP_JOB = make_job(res=64, batch_size=64, classes=len(crops.SIZES), crops=True, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
Box = tuple[float, float, float, float]
"""Top, left, height and width in pixels."""


@pytest.fixture(scope="module")
def expected_crops() -> dict[str, list[float]]:
    return crops.torchvision_crops()


@functools.cache
def check_image(label: int) -> Any:
    """As a loader decodes it: the drawn pixels after JPEG."""
    buffer = io.BytesIO()
    crops.draw(label).save(buffer, "JPEG", quality=100, subsampling=0)
    return Image.open(buffer).convert("RGB")


def cropped(box_of: Callable[[Any, int, int], Box], *, flip: float = 0.5, count: int = 1024) -> Iterator[Any]:
    """Batches of the check set's images, resized by PIL from the boxes that the function draws of (draws, width, height)."""
    draws = random.Random(0)
    shift, scale = (torch.tensor(values)[:, None, None] for values in (CROP_JOB.mean, CROP_JOB.std))
    labels = [number % len(crops.SIZES) for number in range(count)]
    for first in range(0, count, CROP_JOB.batch_size):
        images = []
        for label in labels[first : first + CROP_JOB.batch_size]:
            top, left, height, width = box_of(draws, *crops.SIZES[label])
            box = (left, top, left + width, top + height)
            image = check_image(label).resize((CROP_JOB.res, CROP_JOB.res), Image.Resampling.BICUBIC, box)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
            images.append(((pixels.flip(2) if draws.random() < flip else pixels) - shift) / scale)
        yield torch.stack(images), torch.tensor(labels[first : first + CROP_JOB.batch_size])


def torchvision_box(draws: Any, width: int, height: int) -> Box:
    image = torch.empty(1).expand(1, height, width)
    return RandomResizedCrop.get_params(image, list(crops.CROP_SCALE), list(crops.CROP_RATIO))


def centre_square(draws: Any, width: int, height: int) -> Box:
    side = min(width, height)
    return (height - side) // 2, (width - side) // 2, side, side


def square(draws: Any, width: int, height: int) -> Box:
    """Of the area of torchvision's boxes, as far as it fits."""
    _, _, box_height, box_width = torchvision_box(draws, width, height)
    side = min((box_height * box_width) ** 0.5, width, height)
    return draws.uniform(0, height - side), draws.uniform(0, width - side), side, side


def uniform_sides(draws: Any, width: int, height: int) -> Box:
    """Aspect ratios as torchvision's, but the side is uniform, not the area."""
    while True:
        side = draws.uniform(0.08**0.5, 1) * (width * height) ** 0.5
        stretch = math.exp(draws.uniform(*(math.log(ratio) / 2 for ratio in crops.CROP_RATIO)))
        if side * stretch <= width and side / stretch <= height:
            room_y, room_x = height - side / stretch, width - side * stretch
            return draws.uniform(0, room_y), draws.uniform(0, room_x), side / stretch, side * stretch


def central(draws: Any, width: int, height: int) -> Box:
    """torchvision's boxes, moved to the middle."""
    _, _, box_height, box_width = torchvision_box(draws, width, height)
    return (height - box_height) / 2, (width - box_width) / 2, box_height, box_width


def crops_verdict(batches: Iterable[Any], expected: dict[str, list[float]], count: int = 1024) -> str | None:
    torch.manual_seed(0)
    found = Stream(batches, CROP_JOB).crops(count)
    return why_wrong_form(found, CROP_JOB) or crops.why_wrong_crops(found, expected)


def test_the_crops_of_torchvision_pass(expected_crops: dict[str, list[float]]) -> None:
    assert crops_verdict(cropped(torchvision_box), expected_crops) is None


@pytest.mark.parametrize("res", [32, 64, 224])
def test_a_box_is_read_off_its_crop(res: int) -> None:
    torch.manual_seed(0)  # torchvision draws from torch's generator
    # At 32 px single pixels are more of a crop: there a box is read within the whole of the error that the check allows for.
    part = 1 if res < 64 else 2
    draws, allowed = random.Random(1), {name: error / part for name, error in crops.READ_ERROR.items()}
    for number in range(64):
        label = number % len(crops.SIZES)
        width, height = crops.SIZES[label]
        top, left, box_height, box_width = torchvision_box(draws, width, height)
        image = check_image(label).resize((res, res), Image.Resampling.BICUBIC, (left, top, left + box_width, top + box_height))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        for flipped in (False, True):
            found = crops.read_crops(pixels.flip(3) if flipped else pixels, (0.0,) * 3, (1.0,) * 3)
            read = {name: values[0] for name, values in found.items()}
            assert (read["flipped"], read["label"]) == (flipped, label)
            area = box_width * box_height / (width * height)
            assert read["width"] * read["height"] == pytest.approx(area, abs=allowed["area share"])
            aspect = read["width"] * width / (read["height"] * height)
            assert math.log(aspect) == pytest.approx(math.log(box_width / box_height), abs=allowed["log aspect ratio"])
            assert read["left"] == pytest.approx(left / width, abs=allowed["left edge"])
            assert read["top"] == pytest.approx(top / height, abs=allowed["top edge"])


@pytest.mark.parametrize(
    ("box_of", "flip", "reason"),
    [
        (centre_square, 0.5, r"the mean area share of its crops is 0\.\d+, torchvision's 0\.\d+"),
        (square, 0.5, r"\d+ % of its crops have a log aspect ratio below -0\.\d+, 10 % of torchvision's"),
        (uniform_sides, 0.5, "(the mean area share of its crops is|.* area share below)"),
        (central, 0.5, r"\d+ % of its crops have a left edge below"),
        (torchvision_box, 0.0, "0 % of its crops are flipped horizontally, not half of them"),
    ],
)
def test_other_crops_are_refused(
    expected_crops: dict[str, list[float]], box_of: Callable[..., Box], flip: float, reason: str
) -> None:
    said = crops_verdict(cropped(box_of, flip=flip), expected_crops)
    assert said is not None
    assert re.match(reason, said), said


def test_what_is_no_crop_of_the_check_set_is_refused(expected_crops: dict[str, list[float]]) -> None:
    turned = [(x.transpose(2, 3), y) for x, y in cropped(torchvision_box, count=64)]
    assert crops_verdict(turned, expected_crops, 64) == "64 of 64 images are no upright crops of the check images"
    mislabelled = [(x, (y + 1) % len(crops.SIZES)) for x, y in cropped(torchvision_box, count=64)]
    assert crops_verdict(mislabelled, expected_crops, 64) == "64 of 64 labels are not those of their images"
    small = [(x[:, :, 1:], y) for x, y in cropped(torchvision_box, count=64)]
    assert crops_verdict(small, expected_crops, 64) == "its images have shape [(3, 63, 64)], not (3, 64, 64)"
