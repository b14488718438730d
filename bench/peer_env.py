"""A virtual environment for each peer whose packages could clash with tidali's: created when it is first needed, and kept.

An environment contains the peer and what it alone needs. All other packages, torch above all (5 GB), it takes from the Python
that tidali runs in, whose packages come after its own on the import path. So a peer can have another numpy, but no other torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import CaseFailed
from tidali.console import say
from tidali.files import cache_folder, lock
from tidali.hardware.versions import installed_version

INSTALL_TIMEOUT_S = 1800.0
_SHARED = ("torch", "torchvision")
"""Never installed a second time: the peer runs with the versions that tidali runs with, or not at all."""


class PeerMissing(CaseFailed):
    """A peer that cannot be installed. The message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What pip installs."""

    requirements: tuple[str, ...]
    hint: str = ""
    """What to do if the installation fails."""


ENVIRONMENTS = {
    "ffcv": Environment(
        requirements=("ffcv==1.0.2", "numba"),
        hint="it is compiled here: apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev",
    ),
    "litdata": Environment(requirements=("litdata",)),
    "mosaic": Environment(requirements=("mosaicml-streaming",)),
    "spdl": Environment(requirements=("spdl",)),
    "timm": Environment(requirements=("timm",)),
}


def home() -> Path:
    """The folder in which the environments are kept."""
    return cache_folder() / "peers"


def python_of(name: str) -> Path:
    """The Python that has this peer. Creates its environment if there is none yet; a failure is not remembered.

    Args:
        name: a key of `ENVIRONMENTS`.

    Raises:
        PeerMissing: it cannot be installed; the message names the installer's log.
    """
    environment = ENVIRONMENTS[name]
    folder, log = home() / name, home() / f"{name}.log"
    python, stamp = folder / "bin" / "python", folder / "made.json"
    wanted = {
        "python": sys.version,
        "packages": parent_packages(),
        "shared": _constraints(),
        "requirements": list(environment.requirements),
    }
    try:
        home().mkdir(parents=True, exist_ok=True)
        turn = home() / f"{name}.lock"
        turn.touch()
        with lock(turn, wait=True):
            if not (stamp.is_file() and json.loads(stamp.read_text()) == wanted):
                say(f"installing {name} into {folder}")
                shutil.rmtree(folder, ignore_errors=True)
                _make(folder, python, environment, log)
                stamp.write_text(json.dumps(wanted))
    except (OSError, ValueError) as error:
        raise PeerMissing(f"{folder}: {error}") from None
    return python


class Pythons:
    """The Pythons of one run. It does not retry a failed installation, which can take half an hour to fail."""

    def __init__(self) -> None:
        self._missing: dict[str, PeerMissing] = {}

    def of(self, name: str | None) -> Path:
        """As `python_of`; tidali's own Python if the name is None.

        Raises:
            PeerMissing: it cannot be installed, now or earlier in this run.
        """
        if name is None:
            return Path(sys.executable)
        if name in self._missing:
            raise self._missing[name]
        try:
            return python_of(name)
        except PeerMissing as error:
            self._missing[name] = error
            raise


def parent_packages() -> list[str]:
    """The site-packages folders of this Python."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return list(dict.fromkeys(folder for folder in folders if Path(folder).is_dir()))


def _make(folder: Path, python: Path, environment: Environment, log: Path) -> None:
    with log.open("wb") as out:
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], out, log, "")
        own = next((folder / "lib").glob("python*")) / "site-packages"
        # zz: the last of the .pth files, so that the parent's packages come after the peer's own.
        lines = [f"import site; site.addsitedir({path!r})" for path in parent_packages()]
        (own / "zz_tidali_parent.pth").write_text("\n".join(lines) + "\n")
        constraints = folder / "constraints.txt"
        constraints.write_text("".join(f"{line}\n" for line in _constraints()))
        if importlib.util.find_spec("pip") is None:  # otherwise it is among the parent's packages
            _run([str(python), "-m", "ensurepip"], out, log, "")
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        _run([*pip, "--constraint", str(constraints), *environment.requirements], out, log, environment.hint)


def _run(command: Sequence[str], out: object, log: Path, hint: str) -> None:
    """
    Raises:
        PeerMissing: the command failed.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,  # type: ignore[call-overload]
            stderr=subprocess.STDOUT,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # not the pip or venv of the current folder
        )
    except subprocess.TimeoutExpired:
        raise PeerMissing(f"cannot be installed: not done after {INSTALL_TIMEOUT_S:.0f} s (log: {log})") from None
    if done.returncode:
        reason = what_failed(log.read_text(errors="replace"))
        raise PeerMissing(f"cannot be installed: {reason} (log: {log})" + (f"; {hint}" if hint else ""))


def what_failed(log: str) -> str:
    """The most telling line of an installer's output: an exception, else pip's own error, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    raised = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception")) and ": " in line]
    of_pip = [line for line in lines if line.startswith("ERROR: ")]
    return (raised[-1:] or of_pip[:1] or lines[-1:] or ["no output"])[0].removeprefix("ERROR: ")


def _constraints() -> list[str]:
    found = {name: installed_version(name) for name in _SHARED}
    return [f"{name}=={version}" for name, version in found.items() if version is not None]
