"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from tidali.errors import TidaliError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after a kill or a full disk either the old content or the new is there, whole.

    Raises:
        TidaliError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TidaliError(f"{path}: cannot be written ({error.strerror}); the previous file is untouched") from None
