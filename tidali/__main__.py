"""``python -m tidali``, as torchrun starts it."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # -m puts the current folder first on the import path, where a folder shards or bench would hide the package of that name.
    if Path(sys.path[0]) == Path.cwd() != Path(__file__).resolve().parents[1]:
        del sys.path[0]

    from tidali.cli.main import main

    main()
