"""What the benchmark of starts says of engines whose bits are, or are not, alike."""

import csv
import os
import sys

import pytest

GOOD = {"plain": [(0, "a"), (0, "b"), (1, "a")], "kit": [(9, "k"), (9, "k"), (9, "k")]}


@pytest.fixture
def verdict(tmp_path, monkeypatch, benchmark_module):
    """verdict(bits): the exit status and the rows, of engines that answer so in their three starts."""
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what the benchmark sets is gone after the test
    starts = benchmark_module("starts")

    def run(bits):
        seen = {name: iter(found) for name, found in bits.items()}
        environments = []

        class Engine:
            def __init__(self, name, log):
                self.name = name
                environments.append(os.environ.get("VLLM_USE_AOT_COMPILE"))

            def send(self, **question):
                assert question["do"] == "start" and question["arguments"]["max_model_len"] == 8192

            def receive(self):
                return [{"gpu": "a card", "vllm": "0.26.0+x"}, {"seconds": 1.5, "gpu_mib": 7}]

            def ask(self, **question):
                identical, digest = next(seen[self.name])
                return {"identical": identical, "of": 9, "alone": digest}

            def stop(self):
                pass

        monkeypatch.setattr(starts, "Worker", Engine)
        monkeypatch.setattr(sys, "argv", ["starts.py", "--model", "m", "--out", str(tmp_path)])
        status = starts.main()
        assert environments == [None] * 4 + ["0"] * 2
        with (tmp_path / "starts-0.26.0.csv").open() as file:
            return status, list(csv.DictReader(file))

    return run


def test_alike_and_a_control_that_is_not_passes(verdict, capsys):
    status, rows = verdict(GOOD)
    assert status == 0 and "PASS" in capsys.readouterr().out
    assert [(row["system"], row["alone"]) for row in rows[:2]] == [("plain", "a"), ("kit", "k")] and len(rows) == 6


@pytest.mark.parametrize(
    "kit", [[(9, "k"), (8, "k"), (9, "k")], [(9, "k"), (9, "other"), (9, "k")], [(9, "k"), (9, "k"), (9, "other")]]
)
def test_one_answer_or_one_start_that_differs_fails(verdict, capsys, kit):
    assert verdict(GOOD | {"kit": kit})[0] == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_control_that_is_alike_shows_nothing(verdict, capsys):
    assert verdict(GOOD | {"plain": [(9, "a")] * 3})[0] == 3
    assert "INCONCLUSIVE" in capsys.readouterr().out
