"""The documentation of records shows commands that exist and the words that the program says."""

import re
import shlex
import subprocess
import sys

import pytest
from harness_kit import ROOT

DOCS = ROOT / "docs"
yaml = pytest.importorskip("yaml", reason="PyYAML comes with vLLM")


def commands() -> list[str]:
    """Every command line of the harness in the documents, joined where it goes on in the next line."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))]
    jobs = yaml.safe_load((DOCS / "ci" / "github-actions.yml").read_text(encoding="utf-8"))["jobs"]
    texts += [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip().startswith("python") and "test_determinism.py" in line]


@pytest.fixture(scope="module")
def known() -> str:
    command = [sys.executable, str(ROOT / "vllm" / "test_determinism.py"), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_there_are_commands():
    assert len(commands()) >= 4


@pytest.mark.parametrize("line", commands())
def test_every_option_of_a_shown_command_exists(line, known):
    options = [word for word in shlex.split(line, comments=True) if word.startswith("--")]
    assert options
    for option in options:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", known), option


@pytest.mark.parametrize("target", ["vllm-compose-up-detached", "vllm-test", "vllm-compose-down"])
def test_the_targets_of_the_example_exist(target):
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "docker.mk"))
    assert re.search(rf"^{target}:", text, re.M)


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_every_link_to_a_file_leads_somewhere(path):
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (path.parent / link).exists(), link


def test_the_verdicts_in_the_table_are_the_programs_own():
    program = (ROOT / "vllm" / "determinism" / "verify.py").read_text(encoding="utf-8")
    for verdict in ("✓ EQUAL", "EQUAL BUT IN LOGPROBS", "? INCONCLUSIVE"):
        assert verdict in program and verdict in (DOCS / "records.md").read_text(encoding="utf-8")


def test_every_field_of_a_fingerprint_is_in_the_table():
    sources = ("batch_invariant_ops/fingerprint.py", "batch_invariant_ops/integrations/fingerprint.py")
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in sources)
    table = (DOCS / "determinism.md").read_text(encoding="utf-8").split("made of")[1]
    fields = {*re.findall(r'^        "(\w+)": ', text, re.M)} - {"fingerprint", "model", "revision", "fields"}
    assert len(fields) > 20
    for field in fields:
        assert re.search(rf"\b{field}\b", table), field
