"""Every fuzz target holds for its samples and what is made of them, and finds a parser that has lost a check."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from fuzzing import mutants  # noqa: E402

RUNS = {"fuzz_record": 5_000, "fuzz_answer": 10_000, "fuzz_stream": 3_000}
"""As many as take some seconds."""
DEFECTS = {
    "fuzz_record": "import determinism.records as r, json; r.Reader._checked = lambda self, line: json.loads(line)",
    "fuzz_answer": "import determinism.protocol as p; p.checked = lambda number, *_, **__: number",
    "fuzz_stream": "import determinism.stream as s; s.END_OF_LINE = s.re.compile('\\n')",
}
"""By target, code that takes a check out of the parser."""


def test_every_target_is_tried():
    targets = {path.stem for path in HERE.glob("fuzz_*.py")}
    assert targets == set(RUNS) == set(DEFECTS)


@pytest.mark.parametrize("name", RUNS)
def test_a_target_holds_for_its_samples_and_changed_ones(name):
    target = importlib.import_module(name)
    for data in mutants(target.SAMPLES, RUNS[name] // 5):
        target.test_one_input(data)


@pytest.mark.parametrize("name", RUNS)
def test_changed_samples_find_a_parser_without_its_check(name):
    """The twin of the test above, in a process that ends with the defect."""
    code = f"from fuzzing import mutants; import {name} as target; {DEFECTS[name]}\n"
    code += f"for data in mutants(target.SAMPLES, {RUNS[name] // 5}): target.test_one_input(data)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1 and "in test_one_input" in done.stderr, done.stderr


class TestGuidedByCoverage:
    @pytest.fixture
    def fuzz(self, tmp_path):
        """A function that runs a target, with that code before it, by atheris."""
        pytest.importorskip("atheris", reason="atheris is not installed; it has no wheel for every Python")

        def run(name: str, before: str = "") -> subprocess.CompletedProcess[str]:
            code = f"from fuzzing import fuzz; import {name} as target; {before}\n"
            code += "fuzz(target.test_one_input, target.SAMPLES)"
            options = [f"-runs={RUNS[name]}", "-seed=1", "-max_len=4096", f"-artifact_prefix={tmp_path}/"]
            return subprocess.run(
                [sys.executable, "-c", code, *options],
                cwd=HERE, env={"TMPDIR": str(tmp_path)}, capture_output=True, text=True,
            )  # fmt: skip

        return run

    @pytest.mark.parametrize("name", RUNS)
    def test_a_target_holds(self, fuzz, name):
        done = fuzz(name)
        assert done.returncode == 0 and f"Done {RUNS[name]} runs" in done.stderr, done.stderr[-4000:]

    @pytest.mark.parametrize("name", RUNS)
    def test_a_parser_without_its_check_is_found(self, fuzz, name):
        done = fuzz(name, DEFECTS[name])
        assert done.returncode != 0 and "Uncaught Python exception" in done.stdout + done.stderr, done.stderr[-4000:]


def test_without_atheris_a_target_says_what_is_missing(tmp_path):
    (tmp_path / "atheris.py").write_text("raise ImportError")
    env = {"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(HERE / "fuzz_stream.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    print(done.stderr)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fuzz_stream: atheris is not installed: `pip install atheris` is needed\n"
