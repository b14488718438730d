"""Sources made on the spot: their own images, names and layouts, so that every expected value is known."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.pack import PackReport, pack
from shards.plan import PackSettings
from shards.scan import FileSource

Tree = dict[str, bytes]


class Maker:
    """Makes images, source trees and packs. Everything depends on the arguments alone."""

    def image(self, seed: int, height: int = 40, width: int = 48) -> Image.Image:
        """Smooth with some noise, as photographs are: (height, width) RGB."""
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        noise = rng.integers(-20, 21, (height, width, 3))
        return Image.fromarray(np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8))

    def encode(self, image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        return buffer.getvalue()

    def jpeg(self, seed: int, height: int = 40, width: int = 48) -> bytes:
        return self.encode(self.image(seed, height, width), quality=85)

    def png(self, colour_type: int, bits: int, size: tuple[int, int], rows: bytes, *extra: bytes, lace: bool = False) -> bytes:
        """A PNG of any kind, as PIL does not write them all.

        Args:
            size: height and width.
            rows: each with its filter's number before it.
            extra: whole chunks before the pixels.
        """
        head = struct.pack(">IIBBBBB", size[1], size[0], bits, colour_type, 0, 0, lace)
        chunks = [self.chunk(b"IHDR", head), *extra, self.chunk(b"IDAT", zlib.compress(rows)), self.chunk(b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)

    def chunk(self, kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def png16(self, samples: np.ndarray, *extra: bytes) -> bytes:
        """A PNG of (H, W, 1 to 4) uint16 samples."""
        colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[samples.shape[2]]
        return self.png(colour_type, 16, samples.shape[:2], self.rows(samples.astype(">u2")), *extra)

    def rows(self, samples: np.ndarray) -> bytes:
        return b"".join(b"\0" + row.tobytes() for row in samples)

    def tiff(self, samples: np.ndarray, order: str = "<", *, data: bytes = b"", **tags: tuple[int, ...]) -> bytes:
        """An uncompressed TIFF in one strip of (H, W) or (H, W, 3) samples; ``t262=(0,)`` sets a tag of 16-bit values."""
        height, width, *bands = samples.shape
        data = data or samples.astype(samples.dtype.newbyteorder(order)).tobytes()
        count = bands[0] if bands else 1
        values = {256: (width,), 257: (height,), 258: (8 * samples.itemsize,) * count, 259: (1,), 262: (2 if bands else 1,)}
        values |= {273: (0,), 277: (count,), 278: (height,), 279: (len(data),)} | {int(t[1:]): v for t, v in tags.items()}
        begin = 8 + 2 + 12 * len(values) + 4
        packed = {tag: struct.pack(f"{order}{len(numbers)}H", *numbers) for tag, numbers in values.items()}
        beyond = b"".join(packed[tag] for tag in sorted(values) if len(packed[tag]) > 4)
        packed[273] = struct.pack(order + "H", begin + len(beyond))
        entries, at = b"", begin
        for tag in sorted(values):
            place = packed[tag].ljust(4, b"\0") if len(packed[tag]) <= 4 else struct.pack(order + "I", at)
            at += len(packed[tag]) if len(packed[tag]) > 4 else 0
            entries += struct.pack(order + "HHI", tag, 3, len(values[tag])) + place
        head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(values))
        return head + entries + bytes(4) + beyond + data

    def exif(self, order: str, kind: int, value: int) -> bytes:
        """An EXIF block with an orientation of a type: 1 byte, 3 short, 4 long, 8 signed short."""
        form = {1: "B3x", 3: "H2x", 4: "I", 8: "h2x"}[kind]
        mark = {"<": b"II", ">": b"MM"}[order]
        return mark + struct.pack(order + "HIHHHI" + form + "4x", 42, 8, 1, 0x0112, kind, 1, value)

    def tiny_tree(self, classes: int = 4, train: int = 12, val: int = 3, test: int = 5) -> Tree:
        """Tiny-ImageNet's layout. wnids.txt is not sorted, so that class order is told from name order."""
        ids = [f"n{9000 - 37 * n:08d}" for n in range(classes)]
        tree: Tree = {
            "wnids.txt": "".join(f"{id_}\n" for id_ in ids).encode(),
            "words.txt": "".join(f"{id_}\tthing {n}, no. {n}\n" for n, id_ in enumerate(ids)).encode(),
        }
        seed = 0
        for id_ in ids:
            tree[f"train/{id_}/{id_}_boxes.txt"] = b"no image\n"
            for n in range(train):
                tree[f"train/{id_}/images/{id_}_{n}.JPEG"] = self.jpeg(seed := seed + 1)
        lines = []
        for n in range(val * classes):
            tree[f"val/images/val_{n}.JPEG"] = self.jpeg(seed := seed + 1)
            lines.append(f"val_{n}.JPEG\t{ids[n % classes]}\t0\t0\t47\t39\n")
        tree["val/val_annotations.txt"] = "".join(lines).encode()
        for n in range(test):
            tree[f"test/images/test_{n}.JPEG"] = self.jpeg(seed := seed + 1)
        return tree

    def folder_tree(self, classes: int = 3, train: int = 8, val: int = 2) -> Tree:
        """SPLIT/CLASS/*.jpg"""
        return {
            f"{split}/class_{c}/img {n}.jpg": self.jpeg(1000 * c + 10 * n + (split == "val"))
            for split, count in (("train", train), ("val", val))
            for c in range(classes)
            for n in range(count)
        }

    def folder(self, tree: Tree, root: Path) -> Path:
        for name, data in tree.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return root

    def zip(self, tree: Tree, path: Path, *, inside: str = "", method: int = zipfile.ZIP_STORED) -> Path:
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in tree.items():
                archive.writestr(inside + name, data)
        return path

    def tar(self, path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
        """A tar as other programs write them: with owners and times."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=form) as archive:
            for name, data in members.items() if isinstance(members, dict) else members:
                info = tarfile.TarInfo(name)
                info.size, info.mode, info.mtime, info.uname = len(data), 0o444, 1_700_000_000, "somebody"
                archive.addfile(info, io.BytesIO(data))
        return path

    def shard_writer_tars(self, root: Path, *, train: int = 9, val: int = 5) -> dict[str, list[tuple[bytes, int]]]:
        """SPLIT/000000.tar ... by webdataset.ShardWriter, of four formats, with keys in folders; the pairs, by split."""
        webdataset = pytest.importorskip("webdataset", reason="the webdataset library is not installed")
        kinds = [("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")]
        pairs: dict[str, list[tuple[bytes, int]]] = {}
        for split, count in (("train", train), ("val", val)):
            (root / split).mkdir(parents=True)
            pairs[split] = [(self.encode(self.image(100 * n + len(split)), kinds[n % 4][1]), n % 3) for n in range(count)]
            with webdataset.ShardWriter(f"{root}/{split}/%06d.tar", maxcount=4, verbose=0) as writer:
                for n, (image, label) in enumerate(pairs[split]):
                    writer.write({"__key__": f"some/folder/{n:04d}", kinds[n % 4][0]: image, "cls": label, "txt": "a caption"})
        return pairs

    def img2dataset_tars(self, root: Path, tars: int = 2, samples: int = 6) -> list[tuple[bytes, str]]:
        """00000.tar with a .json for each .jpg, and the files that img2dataset writes beside it; the pairs."""
        pairs = []
        for number in range(tars):
            members: dict[str, bytes] = {}
            for n in range(samples):
                key = f"{number:05d}{n:04d}"
                image, name = self.jpeg(1000 * number + n), ("cat", "a dog", "Äffchen")[n % 3]
                about = {
                    "caption": f"a picture of {name}",
                    "url": "https://x/y.jpg",
                    "key": key,
                    "status": "success",
                    "animal": name,
                }
                members |= {f"{key}.jpg": image, f"{key}.json": json.dumps(about).encode(), f"{key}.txt": b"a picture"}
                pairs.append((image, name))
            self.tar(root / f"{number:05d}.tar", members)
            (root / f"{number:05d}_stats.json").write_text('{"count": 6}')
            (root / f"{number:05d}.parquet").write_bytes(b"PAR1")
        return pairs

    def pack(self, source: Path, dest: Path, *, workers: int = 1, overwrite: bool = False, **settings: Any) -> PackReport:
        return pack(FileSource(source), dest, PackSettings(**settings), workers=workers, overwrite=overwrite)


@pytest.fixture(scope="session")
def make() -> Maker:
    return Maker()


@pytest.fixture(scope="session")
def dali_rgb() -> Callable[[bytes], np.ndarray]:
    """Decodes an image's bytes as DALI does for training on a CPU: (H, W, 3) uint8."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, exec_async=False, exec_pipelined=False, prefetch_queue_depth=1)
    def decode() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)

    pipe = decode()
    pipe.build()

    def run(data: bytes) -> np.ndarray:
        pipe.feed_input("encoded", [np.frombuffer(data, np.uint8)])
        (images,) = pipe.run()
        return np.array(images.at(0))

    return run


@pytest.fixture(scope="session")
def tiny_zip(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """65 images: 4 classes x (12 train + 3 val) and 5 unlabelled ones, inside one folder of the zip."""
    return make.zip(make.tiny_tree(), tmp_path_factory.mktemp("source") / "tiny.zip", inside="tiny-200/")


def folder_bytes(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def contents() -> Any:
    return folder_bytes
