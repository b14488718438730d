"""Weights in a file of any program: what kind of file it is, and the ResNet in it, under torchvision's names.

Nothing is decided by a file's name, and no pickled code is run."""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tidali.errors import UsageError, some_of

_ANCHOR = "layer1.0.conv1.weight"
"""A tensor that every ResNet has, by which its state dict is found in a file, and what stands before its names."""
_USUAL_ENTRIES = ("state_dict", "model_state_dict", "model")
"""Of a checkpoint: where its weights are if it has averaged ones, or others, too."""
_SHOWN = 6  # names in a message
TORCH = "a PyTorch file"
"""What `what_is` says of a file that torch.save wrote."""
_OTHER_PROTOCOL = "written with another pickle protocol than torch.save's own; save it again with that"
_DAMAGED = "damaged, or cut off, or not written by torch.save; copy or download it again"
_EXPORTED = "give the checkpoint that it was exported from"
_STARTS = {
    b"<": "a web page, or other HTML or XML; download the file itself",
    b"version https://git-lfs": "a git-lfs pointer; fetch the file itself with 'git lfs pull'",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"\x89HDF": "an HDF5 file; convert it to a state dict of torch",
    b"{": "JSON; give the file of the weights",
    b"\x08\x0a\x12\x07pytorch": f"an ONNX model; {_EXPORTED}",  # fields of its protocol buffer: version 10, the producer
}


class StateDict(NamedTuple):
    """What was found in a file."""

    tensors: dict[str, Tensor]
    """Under the names that a ResNet has if nothing is left over."""
    others: tuple[str, ...]
    """What else is in the file, by name."""


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as a safetensors file does: the length of a header in 8 bytes, and the header, which is JSON."""
    start = _start(path)
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def what_is(path: Path) -> str:
    """What a file that holds no weights is, with a way out where there is one, by how it begins."""
    start = _start(path)
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in names:
            return "a TorchScript program; save the state_dict() of the module instead"
        if "archive_format" in names:
            return f"a program that torch.export wrote; {_EXPORTED}"
        if "data.pkl" not in names:
            return "a zip archive without weights"
        return _DAMAGED if archive.testzip() else TORCH  # torch.load does not compare the checksums
    if not start:
        return "an empty file; copy or download it again"
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it"
    if start.startswith(b"PK"):
        return _DAMAGED
    if start.startswith(b"\x80"):  # a pickle, as torch.save wrote it before version 1.6
        return TORCH
    known = (what for beginning, what in _STARTS.items() if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(beginning))
    return next(known, "no file of weights; give a safetensors file, or one that torch.save wrote")


def read_torch(path: Path) -> object:
    """What ``torch.save`` wrote: tensors, plain values, and containers of them.

    Raises:
        UsageError: no such file, or one that holds other objects, whose code could do anything.
    """
    kind = what_is(path)
    if kind != TORCH:
        raise UsageError(f"{path}: {kind}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_harmless()):
            warnings.simplefilter("ignore")  # torch's, of old formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or 'cannot be read'}") from None
    except Exception as error:  # torch.load raises whatever its unpickler met
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise UsageError(f"{path}: {_OTHER_PROTOCOL if 'operand' in str(error) else _DAMAGED}") from None
        raise UsageError(
            f"{path}: not loaded, as it holds the Python object {refused[1]}, which could run code; where it was made, save "
            f"the state_dict() of the model alone"
        ) from None


def _harmless() -> list[Any]:
    """What training scripts save beside weights, and runs no code: their arguments, and numpy's scalars, whose module numpy 2
    renamed."""
    scalar, codes = np.float64(0).__reduce__()[0], set(np.typecodes["All"]) - set("OV")  # no objects, no structures
    named = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, np.dtype, *named, *{type(np.dtype(code)) for code in codes}]


def find_state_dict(document: object, where: str) -> StateDict:
    """The state dict of a ResNet in what a file holds, wherever it is in it and whatever wrapper its names begin with.

    Args:
        where: the file, for messages.

    Raises:
        UsageError: there is none, or more than one.
    """
    mappings = dict(_mappings(document))
    found = {name: state for name, state in mappings.items() if _prefixes(state)}
    if len(found) > 1 and len(usual := [name for name in found if name in _USUAL_ENTRIES]) == 1:
        found = {usual[0]: found[usual[0]]}
    if not found:
        if not mappings:
            raise UsageError(f"{where}: holds a value of type {type(document).__name__}, not a state dict")
        fullest = max(mappings.values(), key=lambda one: sum(isinstance(value, Tensor) for value in one.values()))
        raise UsageError(
            f"{where}: no ResNet is in it, {_ANCHOR} is missing; its keys are {_listed(map(str, fullest)) or 'none'}"
        )
    if len(found) > 1:
        raise UsageError(f"{where}: {len(found)} models are in it, {_listed(found)}; save one of them alone")
    ((entry, state),) = found.items()
    prefixes = sorted(_prefixes(state))
    if len(prefixes) > 1:
        names = _listed(f"{prefix}{_ANCHOR}" for prefix in prefixes)
        raise UsageError(f"{where}: {_ANCHOR} is in it {len(prefixes)} times, {names}; save one of these models alone")
    (prefix,) = prefixes
    twice = [name for name in state if prefix and f"{prefix}{name}" in state]
    if twice:
        raise UsageError(f"{where}: {twice[0]!r} and '{prefix}{twice[0]}' are both in it; save one of these models alone")
    tensors = {
        name.removeprefix(prefix): tensor.detach()
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and name.startswith(prefix)
    }
    others = [str(name) for name in state if name.removeprefix(prefix) not in tensors or not name.startswith(prefix)]
    others += [name for name, other in mappings.items() if name != entry and _prefixes(other)]
    return StateDict(tensors, tuple(others))


def _mappings(document: object, name: str = "", depth: int = 2) -> Iterator[tuple[str, dict[str, Any]]]:
    """The mappings in a document, itself too, by name; of their keys those that are text."""
    if isinstance(document, Mapping):
        named = {key: value for key, value in document.items() if isinstance(key, str)}
        yield name, named
        for key, value in named.items() if depth else ():
            yield from _mappings(value, f"{name}.{key}" if name else key, depth - 1)


def _prefixes(state: Mapping[str, Any]) -> set[str]:
    """What stands before torchvision's names, such as '', 'module.' or 'model.backbone.'."""
    names = (name for name, value in state.items() if f".{name}".endswith(f".{_ANCHOR}") and isinstance(value, Tensor))
    return {name.removesuffix(_ANCHOR) for name in names}


def _listed(names: Any) -> str:
    return some_of([ascii(name) for name in names], _SHOWN)


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
