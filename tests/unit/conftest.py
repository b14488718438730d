"""What the tests of the loading room share: images packed on the spot, and those images as PIL and tarfile read them."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from shards.pack import pack
from shards.plan import PackSettings
from shards.record import seal
from shards.scan import FileSource
from tidali.dataset.contract import Dataset, open_dataset, read_record

EXIF_ORIENTATION = 0x0112


def draw_smooth(seed: int, height: int, width: int) -> Image.Image:
    """An image without edges or extremes: right bicubic filters differ on noise by what they do at the clamped ends."""
    y, x = np.mgrid[0:height, 0:width] / 48
    phase = np.array([0.0, 2.1, 4.2]) + 0.37 * seed
    waves = np.sin(2.0 * x[..., None] + 1.3 * y[..., None] + phase) * np.cos(1.7 * y[..., None] - 0.5 * phase)
    return Image.fromarray((128 + 90 * waves).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **{"quality": 90, **options})
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[EXIF_ORIENTATION] = orientation
    return block


def photograph_files() -> dict[str, bytes]:
    """One file of every kind that the packer keeps as it is, each of another size, named by its kind."""
    sizes = np.random.default_rng(0).integers(90, 200, (100, 2)).tolist()
    images = [draw_smooth(number, *size) for number, size in enumerate(sizes)]
    files = {f"jpeg_{n}": encode(images.pop()) for n in range(6)}
    files |= {f"grey_{n}": encode(images.pop().convert("L")) for n in range(2)}
    files |= {f"exif_{o}": encode(images.pop(), exif=exif(o)) for o in range(1, 9)}
    files |= {f"png_{n}": encode(images.pop(), "PNG") for n in range(2)}
    files |= {"png_exif": encode(images.pop(), "PNG", exif=exif(6)), "png_grey": encode(images.pop().convert("L"), "PNG")}
    files |= {f"webp_{n}": encode(images.pop(), "WEBP") for n in range(2)}
    files |= {"progressive": encode(images.pop(), progressive=True), "chroma_444": encode(images.pop(), subsampling=0)}
    return files | {"cmyk": encode(images.pop().convert("CMYK")), "smaller": encode(draw_smooth(70, 40, 30))}


@pytest.fixture(scope="session")
def smooth() -> Callable[[int, int, int], Image.Image]:
    return draw_smooth


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    return encode


@pytest.fixture(scope="session")
def pack_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Dataset]:
    """``pack_files({"train/cat/a.jpg": data})`` packs files; keyword arguments are `PackSettings`'s."""

    def make(files: Mapping[str, bytes], **settings: Any) -> Dataset:
        folder = tmp_path_factory.mktemp("packed")
        with zipfile.ZipFile(folder / "source.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        pack(FileSource(folder / "source.zip"), folder / "packed", PackSettings(**settings), workers=1)
        return open_dataset(folder / "packed")

    return make


@pytest.fixture(scope="session")
def photographs(pack_files: Callable[..., Dataset]) -> Dataset:
    """Photographs of unequal sizes in three classes and three shards a split; train and val hold the same ones. Read only."""
    files = photograph_files()
    tree = {
        f"{split}/class_{number % 3}/{name}.jpg": data
        for split in ("train", "val")
        for number, (name, data) in enumerate(files.items())
    }
    dataset = pack_files(tree, shard_samples=9)
    assert dataset.split("train").samples == len(files)  # none is quarantined
    assert dataset.manifest.counts["exif_rotated"] == 2 * 8
    assert not dataset.manifest.counts.get("reencoded")
    return dataset


@pytest.fixture(scope="session")
def upright() -> Callable[[Dataset, str], list[tuple[np.ndarray, int, str]]]:
    """Every sample of a split as Python's tarfile and PIL read it, in stored order: upright RGB pixels, label and key."""

    def read(dataset: Dataset, split: str) -> list[tuple[np.ndarray, int, str]]:
        samples = []
        for path in dataset.tar_paths(split):
            with tarfile.open(path) as tar:
                files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            for name, data in files.items():
                key, _, extension = name.rpartition(".")
                if extension != "cls":
                    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
                    samples.append((np.asarray(image), int(files[f"{key}.cls"]), key))
        assert len(samples) == dataset.split(split).samples
        return samples

    return read


@pytest.fixture(scope="session")
def replace_bytes() -> Callable[..., str]:
    """``replace_bytes(folder, split, position, at, data)`` writes ``data`` over a packed image's bytes from ``at`` on and
    returns the sample's key. With ``right_crc`` the record and the manifest are made to match: bytes that are as packed, and
    were no image then."""

    def write(folder: Path, split: str, position: int, at: int, data: bytes, *, right_crc: bool = False) -> str:
        import hashlib
        import zlib

        dataset = open_dataset(folder)
        shards = list(dataset.split(split).shards)
        number = 0
        while position >= shards[number].samples:
            position -= shards[number].samples
            number += 1
        shard = shards[number]
        record = read_record(folder, shard)[position]
        assert at + len(data) <= record.size_bytes
        tar = bytearray((folder / shard.name).read_bytes())
        tar[record.offset + at : record.offset + at + len(data)] = data
        changed = folder / f"{shard.name}.changed"
        changed.write_bytes(tar)
        changed.replace(folder / shard.name)  # a loader may still be reading ahead in the old one, whose memory would be gone
        if right_crc:
            document = json.loads((folder / shard.record_name).read_bytes())
            document.pop("checksum")
            document["samples"][position]["crc32"] = zlib.crc32(tar[record.offset : record.offset + record.size_bytes])
            sealed = seal(document)
            (folder / shard.record_name).write_bytes(sealed)
            shards[number] = replace(shard, record_sha256=hashlib.sha256(sealed).hexdigest())
            splits = {**dataset.manifest.splits, split: replace(dataset.split(split), shards=tuple(shards))}
            (folder / "dataset.json").write_text(replace(dataset.manifest, splits=splits).to_json())
        return record.key

    return write
