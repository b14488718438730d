"""Exports a checkpoint as one file to serve: stored pixels in, probabilities out, with resizing and normalisation in the
graph."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from tidali import __version__
from tidali.config import ExportFormat
from tidali.errors import TidaliError, explain_out_of_memory, first_line
from tidali.files import write_atomically
from tidali.hardware.limits import cpu_count
from tidali.hardware.versions import installed_version
from tidali.model.checkpoint import ModelCard
from tidali.model.predict import Classifier
from tidali.model.served import ServedModel

METADATA_KEY = "tidali"
"""Key of ONNX's metadata property; with ``.json``, name of a pt2's extra file. The value is a JSON document."""
MOST_DIFFERENCE = 1e-4
"""Largest difference between the file's and the model's probabilities that is accepted. Both are float32 and differ by the
order of their sums: at most 2e-6 on 500 photographs at 64 and 224 px. With the wrong kernel they differed by 0.06 at 128 px,
with an unclamped overshoot by 0.007."""
_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
_OPSET = 18  # torch's exporter is written for this one; newer ones exclude older runtimes
_BATCH, _BATCH_PIXELS = 64, 1 << 24
"""Of the check: images at most, and pixels of all of them at most, unless one has more. 192 MiB as the file's float32."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Result of comparing an exported file with its model."""

    images: int
    largest_difference: float
    """Over all images and classes."""
    same_top1: int


def export_model(model: Classifier, path: Path, format: ExportFormat, size: tuple[int, int], check_on: np.ndarray) -> Agreement:
    """Write the model as ONNX or as torch.export's program, after running the exported bytes and comparing them with the model.

    Args:
        model: on the CPU, in float32.
        path: the file; it appears whole or not at all.
        size: height and width of the file's input, in pixels.
        check_on: (N, *size, 3) uint8 RGB images.

    Returns:
        How far the file's probabilities are from the model's.

    Raises:
        TidaliError: a package is missing or fails, the file differs from the model, or it cannot be written; no file is
            written then.
    """
    require_packages(format)
    metadata = describe(model.card, size)
    served = ServedModel(model.model, model.card, size)
    batches = f"batches of {_batch_size(size)} images of {size} px"
    with _explain_failure(path, format), explain_out_of_memory(batches, "give a smaller --input-size"):
        with torch.no_grad():
            content = {"onnx": to_onnx, "pt2": to_pt2}[format](served, size, json.dumps(metadata))
            run, found = {"onnx": open_onnx, "pt2": open_pt2}[format](content)
        if json.loads(found) != metadata:
            raise TidaliError(f"{path}: not written, its metadata cannot be read back")
        agreement = compare(run, model, check_on)
    if agreement.largest_difference > MOST_DIFFERENCE:
        raise TidaliError(
            f"{path}: not written, its probabilities differ from the model's by up to {agreement.largest_difference:.1e} "
            f"({agreement.same_top1} of {agreement.images} images with the same top-1); at most {MOST_DIFFERENCE:.0e} is right"
        )
    write_atomically(path, content)
    return agreement


def require_packages(format: ExportFormat) -> None:
    """
    Raises:
        TidaliError: a package is missing; names the extra that installs it.
    """
    missing = [name for name in _PACKAGES if format == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise TidaliError(f"--format onnx needs {', '.join(missing)}: pip install 'tidali[export]'; --format pt2 does not")


@contextmanager
def _explain_failure(path: Path, format: ExportFormat) -> Iterator[None]:
    """One line where torch's exporters or ONNX's packages fail: their exceptions are of any class, and most come from versions
    that do not go together.

    Raises:
        TidaliError: names the cause, the versions that are installed and what to install.
    """
    try:
        yield
    except TidaliError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outermost one often only says in which step it happened
            cause = cause.__cause__
        upgrade, other = (_PACKAGES, "pt2") if format == "onnx" else (("torch", "torchvision"), "onnx")
        installed = ", ".join(f"{package} {installed_version(package)}" for package in dict.fromkeys(("torch", *upgrade)))
        raise TidaliError(
            f"{path}: not written, the export failed ({type(cause).__name__}: {first_line(cause)}) with {installed}; "
            f"pip install --upgrade {' '.join(upgrade)}, or try --format {other}"
        ) from error


def describe(card: ModelCard, size: tuple[int, int]) -> dict[str, Any]:
    """The metadata for serving the file, as a JSON document."""
    height, width = size
    return {
        "tidali": __version__,
        "version": 1,
        "classes": [asdict(one) for one in card.classes],
        "input": {"name": "images", "dtype": "uint8", "layout": "NHWC", "colour": "RGB", "height": height, "width": width},
        "output": {"name": "probabilities", "dtype": "float32"},
        "res": card.res,
        "kernel": card.kernel,
        "crop_fraction": card.crop_fraction,
        "mean": list(card.mean),
        "std": list(card.std),
        "arch": card.arch,
        "stem": card.stem,
        "metrics": dict(card.metrics),
    }


def compare(run: Callable[[np.ndarray], np.ndarray], model: Classifier, images: np.ndarray) -> Agreement:
    """Compare the file's probabilities with those of `Classifier`, on all images in batches and on a single image."""
    expected = model.logits(images).softmax(1).numpy()
    batch = _batch_size((images.shape[1], images.shape[2]))
    found = np.concatenate([run(images[i : i + batch]) for i in range(0, len(images), batch)])
    alone = run(images[:1])
    if found.shape != expected.shape or alone.shape != expected[:1].shape or found.dtype != np.float32:
        raise TidaliError(f"the file returns {found.dtype} {found.shape} for {len(images)} images, {alone.shape} for one")
    differences = np.abs(found - expected).max(), np.abs(alone - expected[:1]).max()
    return Agreement(
        images=len(images),
        largest_difference=float(max(differences)),
        same_top1=int((found.argmax(1) == expected.argmax(1)).sum()),
    )


def _batch_size(size: tuple[int, int]) -> int:
    return max(min(_BATCH, _BATCH_PIXELS // (size[0] * size[1])), 1)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """The exporters warn of their own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@_without_warnings()
def to_onnx(served: ServedModel, size: tuple[int, int], metadata: str) -> bytes:
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        program = torch.onnx.export(
            served,
            (_example(size),),
            dynamo=True,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            opset_version=_OPSET,
            verbose=False,
        )
    finally:
        log.setLevel(level)
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with this machine's paths
    program.model.metadata_props[METADATA_KEY] = metadata
    content: bytes = program.model_proto.SerializeToString()
    return content


@_without_warnings()
def to_pt2(served: ServedModel, size: tuple[int, int], metadata: str) -> bytes:
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(served, (_example(size),), dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with this machine's paths
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f"{METADATA_KEY}.json": metadata})
    return buffer.getvalue()


def _example(size: tuple[int, int]) -> Tensor:
    return torch.zeros(2, *size, 3, dtype=torch.uint8)  # two images: the exporter would make a batch size of one a constant


@_without_warnings()
def open_onnx(content: bytes) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """A function that runs the exported bytes on a batch, and the metadata."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # errors
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpu_count()  # by default it pins threads to cores that a container may lack, and says so
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(["probabilities"], {"images": images})[0])

    return run, session.get_modelmeta().custom_metadata_map[METADATA_KEY]


@_without_warnings()
def open_pt2(content: bytes, device: torch.device | None = None) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """A function that runs the exported bytes on a batch, on a device, and the metadata."""
    extra = {f"{METADATA_KEY}.json": ""}
    program = torch.export.load(io.BytesIO(content), extra_files=extra)
    if device is not None:
        program = move_to_device_pass(program, device)
    run_on = program.module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(run_on(torch.from_numpy(images).to(device)).cpu())

    return run, extra[f"{METADATA_KEY}.json"]
