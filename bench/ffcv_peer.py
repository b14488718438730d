"""FFCV as a peer, in a Python of its own: its last release does not install beside a current torch.

This file is both sides: `FfcvPeer` here, and ``python ffcv_peer.py`` there, which answers each line of its standard input, a
mode and a resolution, with the images in the batch it made.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODES = ("raw", "jpg")


class FfcvPeer:
    """A running FFCV process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @staticmethod
    def start(
        python: str | None, images: Path, scratch: Path, mean: Sequence[float], std: Sequence[float], batch_size: int
    ) -> FfcvPeer | None:
        """Write the images as FFCV files and wait until it is ready; None without a Python that has FFCV."""
        if python is None:
            return None
        arguments = json.dumps(
            {"images": str(images), "scratch": str(scratch), "mean": list(mean), "std": list(std), "batch_size": batch_size}
        )
        process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        peer = FfcvPeer(process)
        if peer._answer() != "ready":
            raise RuntimeError("FFCV did not start; see its messages above")
        return peer

    def cases(self, res: int) -> list[Any]:
        """One case a mode; a step is one batch, asked for and made in the other process."""
        from bench.measure import Case

        def step(mode: str) -> int:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{mode} {res}\n")
            self._process.stdin.flush()
            return int(self._answer())

        return [Case(name=f"FFCV {mode}", step=lambda mode=mode: step(mode)) for mode in MODES]  # type: ignore[misc]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> str:
        """Its next line that is an answer; FFCV's own writer prints too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("tidali:"):
                return line.removeprefix("tidali:").strip()
        raise RuntimeError("FFCV's process ended; see its messages above")


def serve(images: str, scratch: str, mean: list[float], std: list[float], batch_size: int) -> None:
    """The other side. Each answer is the number of images of one batch."""
    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    for mode in MODES:
        writer = DatasetWriter(f"{scratch}/{mode}.beton", {"image": RGBImageField(write_mode=mode), "label": IntField()})
        writer.from_indexed_dataset(ImageFolder(images))

    def batches(mode: str, res: int) -> Any:
        stored = ImageFolder(images)[0][0].size == (res, res)
        decoder = SimpleRGBImageDecoder() if stored else CenterCropRGBImageDecoder((res, res), 1.0)
        normalise = NormalizeImage(255 * np.array(mean), 255 * np.array(std), np.float32)
        loader = Loader(
            f"{scratch}/{mode}.beton",
            batch_size=batch_size,
            num_workers=2,
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=True,
            pipelines={
                "image": [decoder, RandomHorizontalFlip(), normalise, ToTensor(), ToTorchImage()],
                "label": [IntDecoder(), ToTensor()],
            },
        )
        while True:
            yield from loader

    print("tidali:ready", flush=True)
    running: dict[str, Any] = {}
    for line in sys.stdin:
        mode, res = line.split()
        source = running.setdefault(line, None) or batches(mode, int(res))
        running[line] = source
        print(f"tidali:{len(next(source)[1])}", flush=True)


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
