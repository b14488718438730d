"""Where a GPU's stream of small images is best decoded: ``python -m bench.decoders DATA FOLDER``.

For each decoder that there is here, training as ``tidali bench train --cache off`` measures it: its row "loader only" is the
decoder alone, its row "end to end" the decoder while the GPU trains. Writes a record of each into the folder.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from bench.report import show, write_json
from bench.train import bench_train
from tidali.config import DecoderChoice
from tidali.dataset.source import open_data
from tidali.hardware.cpu_threads import wait_briefly
from tidali.loading.stream import dali_is_installed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="a packed data set")
    parser.add_argument("folder", type=Path, help="for the records, which are named decoder-NAME.json")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    wait_briefly()
    dataset = open_data(given.data)
    size = dataset.split("train").single_image_size
    decoders: list[DecoderChoice] = ["cpu"]
    if torch.cuda.is_available() and dali_is_installed():
        decoders.append("mixed")
    for decoder in decoders:
        document = bench_train(
            dataset,
            resolutions=[64 if size is None else size[0]],
            batch_size=given.batch_size,
            repeats=given.repeats,
            cache="off",
            decoder=decoder,
        )
        document["command"] = shlex.join(["python", "-m", "bench.decoders", *sys.argv[1:]])
        show(document)
        write_json(document, str(given.folder / f"decoder-{decoder}.json"))


if __name__ == "__main__":
    main()
