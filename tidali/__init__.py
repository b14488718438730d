"""tidali: from a folder of labelled images to a trained, measured ResNet.

The commands' work from Python, in ten names. The examples run as they stand after ``tidali demo data/demo --classes 4
--per-class 40``.

Train, evaluate, predict:

>>> import tidali
>>> data = tidali.open_data("data/demo")
>>> recipe = tidali.make_recipe("modern", epochs=1, batch_size=32)
>>> settings = tidali.TrainSettings(data="data/demo", out="runs/demo", res=32, recipe=recipe)
>>> result = tidali.train_model(settings)
>>> card, rows = tidali.evaluate_checkpoint("runs/demo", data)
>>> rows[0].res, rows[0].score.samples
(32, 32)
>>> model = tidali.load_model("runs/demo")
>>> [best] = model.predict(["photo.jpg"], top=1)[0]
>>> best.name in model.classes, 0 <= best.probability <= 1
(True, True)

Use the loader in a training loop of your own:

>>> import torch
>>> network = tidali.build_resnet18(len(data.manifest.classes), "imagenet")
>>> optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
>>> loader = tidali.make_loader(data, "train", res=32, batch_size=32, device="cpu")
>>> for epoch in range(2):
...     loader.set_epoch(epoch)
...     for images, labels in loader:
...         loss = torch.nn.functional.cross_entropy(network(images), labels)
...         optimizer.zero_grad()
...         loss.backward()
...         optimizer.step()
>>> len(loader), images.shape, labels.dtype
(5, torch.Size([32, 3, 32, 32]), torch.int64)

Resize on any device, as the network's input is made:

>>> resample = tidali.Resample((48, 64), card.preprocess(224))
>>> resample(torch.zeros(2, 48, 64, 3, dtype=torch.uint8)).shape
torch.Size([2, 3, 224, 224])

Whatever a user can cause is a `TidaliError`, one line that says what to do:

>>> try:
...     tidali.open_data("nowhere")
... except tidali.TidaliError as error:
...     print(error)
nowhere: no dataset.json here; make a data set with 'tidali shard SOURCE nowhere'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidali.api import make_loader as make_loader
    from tidali.api import train_model as train_model
    from tidali.config import TrainSettings as TrainSettings
    from tidali.dataset.source import open_data as open_data
    from tidali.errors import TidaliError as TidaliError
    from tidali.loading.resample import Resample as Resample
    from tidali.model.predict import load_model as load_model
    from tidali.model.resnet import build_resnet18 as build_resnet18
    from tidali.recipes import make_recipe as make_recipe
    from tidali.training.evaluation import evaluate_checkpoint as evaluate_checkpoint

__version__ = "0.1.0"

_HOMES = {
    "Resample": "tidali.loading.resample",
    "TidaliError": "tidali.errors",
    "TrainSettings": "tidali.config",
    "build_resnet18": "tidali.model.resnet",
    "evaluate_checkpoint": "tidali.training.evaluation",
    "load_model": "tidali.model.predict",
    "make_loader": "tidali.api",
    "make_recipe": "tidali.recipes",
    "open_data": "tidali.dataset.source",
    "train_model": "tidali.api",
}

__all__ = list(_HOMES)


if not TYPE_CHECKING:  # to a type checker it would stand for every name there is

    def __getattr__(name: str) -> Any:
        """Imported when first asked for: ``tidali --help`` must not wait for torch."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
