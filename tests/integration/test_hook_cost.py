"""What the hook costs a process that never imports vLLM: one small module. benchmarks/hook.py measures the time."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = "import sys; print(*sorted(sys.modules), sep='\\n')"


def modules(*path, **env):
    """Every module that an otherwise empty process has imported."""
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", MODULES]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split("\n"))


@pytest.mark.parametrize("switch", [{"BATCH_INVARIANT": "1"}, {}], ids=["on", "off"])
def test_the_hook_imports_nothing_but_itself(switch):
    assert modules(ROOT / "vllm", **switch) - modules() <= {"sitecustomize"}
    assert "sitecustomize" in modules(ROOT / "vllm", **switch)


def test_an_import_of_the_standard_librarys_would_be_seen(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import json")
    assert "json.decoder" in modules(ROOT / "vllm", tmp_path, BATCH_INVARIANT="1") - modules()


def test_the_benchmark_measures_each_case_against_the_plain_one(tmp_path):
    out = tmp_path / "hook.csv"
    command = [sys.executable, str(ROOT / "benchmarks" / "hook.py"), "--rounds", "4", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "the hook adds" in done.stdout.splitlines()[-1], done.stderr
    with out.open(newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert set(rows) >= {"without the hook", "with it"}
    assert float(rows["without the hook"]["added_wall_ms"]) == 0 < float(rows["with it"]["wall_ms"])
