"""``bench/first_gpu.sh``'s page, of a folder as the script leaves it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import bench
from bench import first_gpu

BENCH = Path(bench.__file__).parent


def test_the_page_shows_what_became_of_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    stages = {"doctor": 0, "train-cached": 0, "step": 1, "tests": 124}
    (tmp_path / "stages.tsv").write_text("".join(f"{name}\t{code}\t7\n" for name, code in stages.items()))
    for name in stages:
        (tmp_path / f"{name}.log").write_text(f"first line\nlast of <{name}>\n\n")
    recorded = json.loads(next((BENCH / "results").glob("train_*.json")).read_text())
    (tmp_path / "train-cached.json").write_text(json.dumps(recorded))
    monkeypatch.setattr("sys.argv", ["first_gpu", str(tmp_path)])
    with pytest.raises(SystemExit, match="step, tests: not ok"):
        first_gpu.main()
    assert "index.html" in capsys.readouterr().out
    page = (tmp_path / "index.html").read_text()
    for fact in ("ok", "failed, exit code 1", "took too long", "last of &lt;doctor&gt;", 'href="step.log"', "<svg"):
        assert fact in page
    assert all(diagnosis["line"].split("%")[0] in page for diagnosis in recorded["diagnosis"])


def test_the_script_is_bash() -> None:
    script = BENCH / "first_gpu.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    text = script.read_text()
    for name in (*first_gpu.RECORDS[:2], "step", "doctor", "study", "tests", "decoders"):
        assert f"\nstage {name} " in text
