"""What a new Python process finds on its import path. Standard library only, because the packer asks too."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def own_import_path() -> Iterator[None]:
    """Processes that `multiprocessing` starts while this is entered import from this process's import path.

    Python puts the current folder first on the path of a process that it starts with ``-c``, as `multiprocessing` does. A
    folder there that has the name of a package, such as a clone of tidali or shards in a folder ``shards``, would hide it.
    Python 3.10 has no PYTHONSAFEPATH and still does.
    """
    wanted = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
