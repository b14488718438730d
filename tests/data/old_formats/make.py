"""Makes the files beside it, with the code of commit 83c57f5, from before tidali's modules moved into sub-packages.

    git worktree add --detach /tmp/old 83c57f5
    PYTHONPATH=/tmp/old python tests/data/old_formats/make.py

It does not run with the present code, which must read what it made.

- ``packed/``: a demo data set of 3 classes, 18 train and 15 val images of 64 x 64.
- ``stopped.tar.xz``: the folder of a run of two epochs that a SIGTERM stopped within the second one.
- ``finished.tar.xz``: the same run, resumed to its end.
- ``expected.json``: results of the old code: the labels and mean values of the images, and the evaluation and predictions
  of the finished run's best checkpoint.

The state of a ResNet-18 has 134 MB, and trained weights do not compress. So the weights, moving averages and momentum are
overwritten by a periodic pattern whenever a file is saved, and training continues from those. Everything else is as the old
code writes it.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import os
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tidali.interrupt import Interrupted
from torch import Tensor, nn

import tidali
from shards.demo import pack_demo
from tidali import train

HERE = Path(__file__).parent
RUN = "run"
SAVE_CHECKPOINT, SAVE_STATE = train.save_checkpoint, train.save_state


def fill(name: str, tensor: Tensor) -> None:
    """A pattern of period 7, which is prime to the 9 weights of a kernel, at the scale that keeps activations of order 1."""
    if not tensor.is_floating_point():
        return
    pattern = (torch.arange(tensor.numel()) % 7 - 3).to(tensor.dtype).reshape(tensor.shape)
    if name.endswith("running_var"):
        tensor.fill_(1.0)
    elif name == "fc.weight":  # of another period, or all classes would have the same one
        tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) % 11 / 2 - 2.5)
    elif tensor.dim() > 1:
        tensor.copy_(pattern / 2 * (2 / tensor[0].numel()) ** 0.5)
    elif name.endswith("weight"):  # of a batch norm
        tensor.fill_(0.2)
    else:
        tensor.copy_(pattern / 100)


def fill_model(model: nn.Module) -> None:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            fill(name, tensor)


def write_checkpoint(path: Path, model: nn.Module, card: Any) -> None:
    """In place of the old code's. After the first epoch it stops the run, which saves its state after one more step."""
    fill_model(model)
    SAVE_CHECKPOINT(path, model, card)
    if path.stem == "best" and card.metrics["epoch"] == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def write_state(path: Path, state: Any, *rest: Any) -> None:
    """In place of the old code's."""
    fill_model(state.model)
    fill_model(state.ema.model)
    for values in state.optimizer.state.values():
        fill("momentum", values["momentum_buffer"])
    SAVE_STATE(path, state, *rest)


def archive(path: str) -> None:
    with lzma.open(path, "w", preset=9) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for file in sorted(Path(RUN).iterdir()):
            tar.add(file, arcname=file.name, filter=anonymous)


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def expected() -> dict[str, Any]:
    """What the old code makes of the packed data and of the finished run."""
    data = tidali.open_data("packed")
    labels = {
        split: [
            label
            for _, batch in tidali.make_loader(data, split, train=False, batch_size=5, device="cpu")
            for label in batch.tolist()
        ]
        for split in ("train", "val")
    }
    (images, _), *_ = tidali.make_loader(data, "val", batch_size=15, device="cpu")
    _, rows = tidali.evaluate_checkpoint(RUN, data, device="cpu", amp="off", resolutions=[32, 64])
    with tarfile.open("packed/val-000000.tar") as tar:
        photos = [Image.open(tar.extractfile(name)).convert("RGB") for name in tar.getnames() if name.endswith(".jpg")]
    predictions = tidali.load_model(RUN, device="cpu", amp="off").predict(photos, top=3)
    return {
        "labels": labels,
        "image_means": images.mean((1, 2, 3)).tolist(),
        "evaluation": [{"res": row.res, **row.score.to_dict()} for row in rows],
        "predictions": [[{"id": one.id, "probability": one.probability} for one in scores] for scores in predictions],
    }


def main() -> None:
    os.chdir(HERE)
    for name in ("packed", RUN):
        shutil.rmtree(name, ignore_errors=True)
    pack_demo(Path("packed"), classes=3, per_class=6, workers=1)
    recipe = tidali.make_recipe("modern", epochs=2, batch_size=6, lr=0.001)
    settings = tidali.TrainSettings(data="packed", out=RUN, res=32, recipe=recipe, device="cpu", amp="off", cache="device")
    train.save_checkpoint, train.save_state = write_checkpoint, write_state
    with contextlib.suppress(Interrupted):
        tidali.train_model(settings)
    archive("stopped.tar.xz")
    tidali.train_model(settings, resume=True)
    archive("finished.tar.xz")
    Path("expected.json").write_text(json.dumps(expected(), indent=1) + "\n")
    shutil.rmtree(RUN)


if __name__ == "__main__":
    main()
