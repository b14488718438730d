"""The packers that people use today, each used as its documentation shows. Run as a script by a Python that has the package.

    python pack_peers.py CASE FOLDER DEST WORKERS

FOLDER contains LABEL/NAME.jpg. FFCV decodes every image. webdataset does not, and so finds no corrupt image: it is measured
both as it is, and with every image decoded, as tidali does to check it.
"""

from __future__ import annotations

import io
import multiprocessing
import sys
from pathlib import Path
from typing import Any

Sample = tuple[Path, int]

_SHARD_SAMPLES = 1000


class Images:
    """FFCV's 'indexed dataset': (PIL image, label)."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        path, label = self.samples[index]
        with Image.open(path) as image:
            return image.convert("RGB"), label


def pack_ffcv(samples: list[Sample], dest: Path, workers: int, write_mode: str) -> None:
    """'jpg' encodes the decoded pixels again and 'raw' stores them; FFCV does not keep the bytes of the source."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode=write_mode, jpeg_quality=90), "label": IntField()}
    DatasetWriter(str(dest / "train.beton"), fields, num_workers=workers).from_indexed_dataset(Images(samples))


def pack_webdataset(samples: list[Sample], dest: Path, workers: int, decode: bool) -> None:
    """A ShardWriter uses one process. webdataset's FAQ says to run several, each with its own shards."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(_write_shards, [(samples[n::workers], str(dest / f"train-{n}-%06d.tar"), decode) for n in range(workers)])


def _write_shards(samples: list[Sample], pattern: str, decode: bool) -> None:
    from PIL import Image
    from webdataset import ShardWriter

    with ShardWriter(pattern, maxcount=_SHARD_SAMPLES, verbose=0) as writer:
        for number, (path, label) in enumerate(samples):
            data = path.read_bytes()
            if decode:
                with Image.open(io.BytesIO(data)) as image:
                    image.convert("RGB")
            writer.write({"__key__": f"{number:08d}", "jpg": data, "cls": label})


def main(case: str, folder: str, dest: str, workers: str) -> None:
    samples = [(path, int(path.parent.name)) for path in sorted(Path(folder).glob("*/*.jpg"))]
    if case.startswith("webdataset"):
        pack_webdataset(samples, Path(dest), int(workers), decode=case == "webdataset")
    else:
        pack_ffcv(samples, Path(dest), int(workers), case.removeprefix("FFCV "))


if __name__ == "__main__":
    main(*sys.argv[1:])
