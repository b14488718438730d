"""docs/format.md is enough to implement from: a second one, made from its text, agrees with the packer to the bit."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest

from shards.pack import pack
from shards.plan import PackSettings
from shards.scan import FileSource

SPECIFICATION = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
CLASSES = [f"c{number:02d}" for number in range(11)]  # labels of two digits


@pytest.fixture(scope="module")
def source(write_photos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_photos(tmp_path_factory.mktemp("format") / "photos", {f"train/{name}": 6 for name in CLASSES}, size=(24, 16))
    (root / "train" / "c03" / "a very.long näme with spaces.jpg").write_bytes((root / "train" / "c03" / "000.jpg").read_bytes())
    (root / "train" / "c05" / "broken.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    folder = source.parent / "packed"
    pack(FileSource(source, "folder"), folder, PackSettings(seed=7, shard_samples=20, val_fraction=0.3), workers=1)
    return folder


@pytest.fixture(scope="module")
def manifest(packed: Path) -> dict[str, Any]:
    return json.loads((packed / "dataset.json").read_text())


def header(name: str, size: int) -> bytes:
    """From the specification's table."""
    contents = {
        "`KEY.EXT` in ASCII, then zero bytes": name.encode(),
        "of the data: 11 octal digits and a zero byte": b"%011o\0" % size,
        "6 octal digits, a zero byte, a space": b" " * 8,
        "zero bytes": b"",
    }
    out = b""
    for offset, length, content in re.findall(r"^\| (\d+) \| (\d+) \| \w+ \| (.*) \|$", SPECIFICATION, re.MULTILINE):
        assert len(out) == int(offset)
        literal = re.fullmatch(r"`([^`]+)`( and a zero byte)?", content)
        field = literal[1].encode() + (b"\0" if literal[2] else b"") if literal else contents[content]
        out += field.ljust(int(length), b"\0")
    assert len(out) == 512
    return out[:148] + b"%06o\0 " % sum(out) + out[156:]


def members(sample: dict[str, Any], image: bytes, digits: int) -> list[tuple[str, bytes]]:
    label = str(sample["label"]).zfill(digits).encode()
    return [(f"{sample['key']}.{sample['extension']}", image), (f"{sample['key']}.cls", label)]


def test_tars_and_indexes(source: Path, packed: Path, manifest: dict[str, Any]) -> None:
    digits = len(str(len(manifest["classes"]) - 1))
    seen = 0
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            stem = shard["name"].removesuffix(".tar")
            tar, lines = b"", []
            for sample in json.loads((packed / f"{stem}.json").read_text())["samples"]:
                groups = []
                image = (source / sample["source"]).read_bytes()
                assert zlib.crc32(image) == sample["crc32"]
                for name, data in members(sample, image, digits):
                    tar += header(name, len(data))
                    groups.append(f"{name.partition('.')[2]} {len(tar)} {len(data)} {name}")
                    tar += data + bytes(-len(data) % 512)
                lines.append(" ".join(groups))
                seen += 1
            assert (packed / shard["name"]).read_bytes() == tar + bytes(1024)
            index = "".join(f"{line}\n" for line in [f"v1.2 {len(lines)}", *lines])
            assert (packed / f"{stem}.idx").read_text() == index
            assert shard["samples"] == len(lines)
            assert shard["size_bytes"] == len(tar) + 1024
    assert seen == 11 * 6 + 1


def rank(purpose: str, name: str) -> bytes:
    text = f"7\0{purpose}\0{name}".encode()
    return hashlib.blake2b(text, digest_size=8).digest() + text


def key(ordinal: int, name: str) -> str:
    stem = name.rpartition("/")[2].rpartition(".")[0]
    return f"{ordinal:08d}_{re.sub('[^A-Za-z0-9_-]+', '_', stem)[:64]}"


def test_keys_order_and_what_is_held_out(source: Path, packed: Path, manifest: dict[str, Any]) -> None:
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*.jpg"))
    held: set[str] = set()
    for class_ in CLASSES:
        of_class = [name for name in names if name.startswith(f"train/{class_}/")]
        held.update(sorted(of_class, key=lambda name: rank("held out", name))[: max(1, round(0.3 * len(of_class)))])
    expected = {"train": [name for name in names if name not in held], "val": [name for name in names if name in held]}
    for split, listing in expected.items():
        keys = {name: key(ordinal, name) for ordinal, name in enumerate(listing)}
        order = sorted(listing, key=lambda name: rank("order", name)) if split == "train" else listing
        records = [
            json.loads((packed / shard["name"].replace(".tar", ".json")).read_text())
            for shard in manifest["splits"][split]["shards"]
        ]
        stored = [(sample["source"], sample["key"]) for record in records for sample in record["samples"]]
        assert stored == [(name, keys[name]) for name in order if "broken" not in name]
        assert all(len(record["samples"]) + len(record["quarantined"]) == 20 for record in records[:-1])
    assert [entry["source"] for entry in manifest["quarantine"]] == ["train/c05/broken.jpg"]


def test_hashes_and_checksums(packed: Path, manifest: dict[str, Any]) -> None:
    def digest(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    document = {name: value for name, value in manifest.items() if name != "checksum"}
    assert digest(json.dumps(document, ensure_ascii=False).encode()) == manifest["checksum"]
    plan = digest(json.dumps([manifest["source"], manifest["settings"], manifest["classes"]], sort_keys=True).encode())[:16]
    pixels, sums, squares = 0, [0] * 3, [0] * 3
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            tar, index, sealed = (
                (packed / shard["name"].replace("tar", suffix)).read_bytes() for suffix in ("tar", "idx", "json")
            )
            hashes = (shard["sha256"], shard["index_sha256"], shard["record_sha256"])
            assert (digest(tar), digest(index), digest(sealed)) == hashes
            record = json.loads(sealed)
            assert record["plan"] == plan
            assert record["checksum"] == digest(sealed[: sealed.rindex(b',"checksum":"')])
            if split["name"] == "train":
                pixels += record["pixels"]
                sums = [a + b for a, b in zip(sums, record["sums"], strict=True)]
                squares = [a + b for a, b in zip(squares, record["square_sums"], strict=True)]
            for entry in record["quarantined"]:
                assert digest((packed / entry["file"]).read_bytes()) == entry["sha256"]
                assert entry["file"] == f"quarantine/{entry['split']}-{entry['key']}.bin"
    mean = [total / pixels / 255 for total in sums]
    std = [(square / pixels / 255**2 - m**2) ** 0.5 for square, m in zip(squares, mean, strict=True)]
    assert manifest["mean"] == pytest.approx(mean)
    assert manifest["std"] == pytest.approx(std, rel=1e-6)  # the difference of two close numbers, here in floating point


def test_every_entry_is_described(packed: Path, manifest: dict[str, Any]) -> None:
    record = json.loads((packed / "train-000000.json").read_text())
    split = manifest["splits"]["train"]
    names = {*manifest, *split, *split["shards"][0], *record, *record["samples"][0], *manifest["quarantine"][0]}
    names |= {*manifest["settings"], *manifest["source"]}
    assert {name for name in names if f"`{name}`" not in SPECIFICATION} == set()
