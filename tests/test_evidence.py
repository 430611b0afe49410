"""The command that gathers a GPU's evidence: jobs spread over cards, each with its log, and how each ended."""

import csv
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def evidence(tmp_path, monkeypatch, benchmark_module):
    """The module, on a machine whose nvidia-smi tells of two cards."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho '0, Card A, 580.1'\necho '1, Card B, 580.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)
    return benchmark_module("evidence")


@pytest.fixture
def gathered(evidence, monkeypatch, tmp_path):
    """gathered(jobs, *options): the exit status, and each job's status and card as the summary has them."""

    def run(jobs, *options):
        monkeypatch.setattr(evidence, "JOBS", jobs)
        monkeypatch.setattr(sys, "argv", ["evidence.py", "--out", str(tmp_path / "out"), *options])
        status = evidence.main()
        with (tmp_path / "out" / "summary.csv").open() as file:
            return status, {row["job"]: (row["status"], row["gpu"]) for row in csv.DictReader(file)}

    return run


def python(evidence, code, minutes=1.0, shows=""):
    return evidence.Job(("-c", code), minutes, shows)


def test_jobs_share_the_cards_and_each_sees_its_own(evidence, gathered, tmp_path):
    show = "import os; print('card', os.environ['CUDA_VISIBLE_DEVICES'])"
    status, ended = gathered({name: python(evidence, show) for name in ("a", "b", "c")})
    assert status == 0 and {state for state, _ in ended.values()} == {"0"}
    assert {card for _, card in ended.values()} == {"Card A, 580.1", "Card B, 580.1"}
    for name, (_, card) in ended.items():
        head, machine, _, *said = (tmp_path / "out" / f"{name}.txt").read_text().splitlines()
        assert head == f"$ python3 -c {show}" and machine.startswith(f"{card}; ") and "torch 2" in machine
        assert said == ["card 0" if "Card A" in card else "card 1"]


def test_every_end_but_a_good_one_is_told(evidence, gathered):
    jobs = {
        "good": python(evidence, "print('3 passed')", shows=" passed"),
        "fails": python(evidence, "raise SystemExit(3)"),
        "slow": python(evidence, "import signal; signal.pause()", minutes=0.02),
        "skips": python(evidence, "print('9 skipped')", shows=" passed"),
    }
    status, ended = gathered(jobs)
    assert status == 1
    assert {name: state for name, (state, _) in ended.items()} == {
        "good": "0", "fails": "3", "slow": "cut", "skips": "nothing",
    }  # fmt: skip


def test_what_no_time_is_left_for_is_cut_and_in_the_summary(evidence, gathered):
    endless = python(evidence, "import signal; signal.pause()")
    status, ended = gathered(dict.fromkeys("abc", endless), "--minutes", "0.02")
    assert status == 1 and {state for state, _ in ended.values()} == {"cut"} and len(ended) == 3


def test_cards_that_are_not_there_are_refused(evidence, gathered, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        gathered({}, "--gpus", "2")
    assert ended.value.code == 2 and "--gpus 2 is not valid: 0, 1 is there" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(evidence.Failure, match="a GPU is needed"):
        gathered({})


def test_the_real_jobs_name_what_is_there(evidence):
    for name, job in evidence.JOBS.items():
        scripts = [word for word in job.command if word.endswith(".py")]
        assert all((ROOT / script).is_file() for script in scripts), name
        assert [word.format(out="o", model="m") for word in job.command]
