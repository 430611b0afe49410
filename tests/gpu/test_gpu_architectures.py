"""Batch invariance of real engines by architecture, each with plain vLLM as its control: minutes, on a card alone."""

import csv
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # this repository's folder of that name is a package without an origin
    pytest.mark.skipif(getattr(find_spec("vllm"), "origin", None) is None, reason="needs vLLM"),
]
COMMAND = Path(__file__).resolve().parents[2] / "benchmarks" / "architectures.py"


def test_answers_are_the_same_alone_and_in_a_crowd_where_those_of_plain_vllm_are_not(tmp_path):
    cases = ["llama", "gemma2", "gpt2"]
    out = tmp_path / "architectures.csv"
    options = ["--only", *cases, "--dtypes", "bfloat16", "--jobs", "3", "--out", str(out), "--logs", str(tmp_path)]
    done = subprocess.run([sys.executable, str(COMMAND), *options], capture_output=True, text=True)
    with out.open(encoding="utf-8") as file:
        verdicts = {row["case"]: row["verdict"] for row in csv.DictReader(file)}
    assert verdicts == dict.fromkeys(cases, "PASS"), done.stdout + done.stderr
