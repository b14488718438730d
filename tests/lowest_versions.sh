#!/usr/bin/env bash
# The fast tests with the lowest versions that pyproject.toml promises, in an environment of their own:
#
#   tests/lowest_versions.sh                              all of them at their lowest
#   tests/lowest_versions.sh 'torch==2.11.*'              these versions, and what pip chooses for the others
#
# PYTHON is the interpreter to try (python3 by default), VENV the folder of the environment (a temporary one by default).
# By hand: it downloads several GB.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-$(mktemp -d)/venv}
"${PYTHON:-python3}" -m venv "$venv"
constraints=$venv/constraints.txt
if [ $# -gt 0 ]; then
    printf '%s\n' "$@" > "$constraints"
else
    # "torch>=2.9" becomes "torch==2.9"; of what is only needed for tests, any version will do.
    "$venv/bin/python" - pyproject.toml > "$constraints" <<'END'
import re, sys
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pip brings its own copy
    from pip._vendor import tomli as tomllib
project = tomllib.loads(open(sys.argv[1]).read())["project"]
extras = project["optional-dependencies"]
for line in [*project["dependencies"], *extras["export"], *extras["tensorboard"]]:
    name, version = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
    print(f"{name}=={version}")
END
fi
cat "$constraints"
"$venv/bin/pip" install --quiet --disable-pip-version-check -c "$constraints" -e '.[test]'
"$venv/bin/python" --version
"$venv/bin/pip" list --disable-pip-version-check 2>/dev/null | grep -i -E "^($(sed 's/==.*//' "$constraints" | paste -sd'|' -)) "
nice "$venv/bin/python" -m pytest -q -x -m "not slow" -p no:cacheprovider tests/unit tests/parity tests/packing tests/cli
