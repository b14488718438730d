#!/usr/bin/env bash
# The fast tests with the lowest versions that pyproject.toml promises, in an environment of their own:
#
#   tests/lowest_versions.sh                                 the lowest version of each package, with the lowest Python
#   tests/lowest_versions.sh python3.12 'torch==2.11.*'      this Python, these versions, and the newest of the others
#
# The first argument is a Python by name or by path. Without it, the lowest Python that pyproject.toml promises is looked for on
# PATH and among pyenv's. VENV is the folder of the environment, which is kept (by default a temporary one, which is not).
# By hand: it downloads several GB.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -gt 0 ]; then
    candidates=("$1")
    shift
else
    lowest=$(sed -n 's/^requires-python = ">=\(.*\)"$/\1/p' pyproject.toml)
    candidates=("python$lowest" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$lowest".*"/bin/python$lowest")
fi
for python in "${candidates[@]}"; do # pyenv puts names on PATH that do not run
    "$python" -c 'import venv' 2> /dev/null && break
    python=
done
[ -n "$python" ] || { echo "none of these runs: ${candidates[*]}; give a Python as the first argument" >&2; exit 2; }

if [ -z "${VENV:-}" ]; then
    VENV=$(mktemp -d)/venv
    trap 'rm -rf "$(dirname "$VENV")"' EXIT
fi
"$python" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet uv
versions=("$@")
[ $# -gt 0 ] || versions=(--resolution lowest-direct)
"$VENV/bin/uv" pip install --python "$VENV/bin/python" "${versions[@]}" -e '.[test,ray]'
"$VENV/bin/python" --version
nice -n 5 "$VENV/bin/python" -m pytest -q -m "not slow" -p no:cacheprovider tests
