"""A certificate is found again where it holds, and never used where it does not."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from batch_invariant_ops import certificates, proving
from batch_invariant_ops.certificates import Case, Certificate
from batch_invariant_ops.ops import cublaslt, vendor_gemm
from batch_invariant_ops.proof import Window

CPU = torch.device("cpu")
CASE = Case(48, 64, torch.bfloat16)
CERTIFICATE = Certificate(100, ((1, 2), (4, 4)), Window(5, 100, 96), 1.5)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCH_INVARIANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_kept_is_found_again_and_nothing_else_is_left(cache):
    path = certificates.save(CASE, CPU, CERTIFICATE)
    assert certificates.load(CASE, CPU) == CERTIFICATE
    assert list(cache.iterdir()) == [path] and path.stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize(
    "other",
    [
        Case(49, 64, torch.bfloat16),
        Case(48, 65, torch.bfloat16),
        Case(48, 64, torch.float16),
        Case(48, 64, torch.bfloat16, has_bias=True),
        Case(48, 64, torch.bfloat16, weight_is_packed=False),
    ],
    ids=str,
)
def test_another_gemm_is_not_covered(other, caplog):
    certificates.save(CASE, CPU, CERTIFICATE)
    assert certificates.load(other, CPU) is None and not caplog.records


@pytest.mark.parametrize("fact", ["torch", "triton", "contract", "device", "threads"])
def test_another_machine_is_not_covered(fact, monkeypatch, caplog):
    certificates.save(CASE, CPU, CERTIFICATE)
    here = certificates.machine(CPU)
    monkeypatch.setattr(certificates, "machine", lambda device: here | {fact: "another"})
    assert certificates.load(CASE, CPU) is None and not caplog.records


def damaged(content, **changes):
    return json.dumps(json.loads(content) | changes)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda text: "", "JSONDecodeError"),
        (lambda text: text[:50], "JSONDecodeError"),
        (lambda text: "[]", "TypeError"),
        (lambda text: "null", "TypeError"),
        (lambda text: damaged(text, format=99), "another format: 99, not 4"),
        (lambda text: damaged(text, machine={"device": "NVIDIA H100"}), "another machine"),
        (lambda text: damaged(text, case={}), "another case"),
        (lambda text: damaged(text, largest="many"), "'many' is not a number of rows"),
        (lambda text: damaged(text, largest=True), "True is not a number of rows"),
        (lambda text: damaged(text, largest=50), "is not a window over every M up to 50"),
        (lambda text: damaged(text, window={"floor": 0, "cap": 100, "tried": 101}), "0 is not a number of rows"),
        (lambda text: damaged(text, window={"floor": 5, "cap": 100, "tried": 7}), "is not a window over every M"),
        (lambda text: damaged(text, window={"floor": 1, "cap": 100, "tried": 100}), "holds values of M that disagree"),
        (lambda text: damaged(text, window={"floor": 5}), "TypeError"),
        (lambda text: damaged(text, disagree=7), "TypeError"),
        (lambda text: text.replace('"largest"', '"smallest"'), "it has no 'largest'"),
        (lambda text: "\udcff", "UnicodeDecodeError"),
    ],
)
def test_a_damaged_or_foreign_one_is_ignored_with_one_line(damage, said, caplog):
    path = certificates.save(CASE, CPU, CERTIFICATE)
    path.write_text(damage(path.read_text()), errors="surrogateescape")
    assert certificates.load(CASE, CPU) is None
    (record,) = caplog.records
    assert str(path) in record.message and said in record.message and "\n" not in record.message


def test_one_that_cannot_be_read_is_ignored(caplog):
    path = certificates.save(CASE, CPU, CERTIFICATE)
    path.unlink()
    path.mkdir()
    assert certificates.load(CASE, CPU) is None
    assert "is ignored" in caplog.text


def test_a_write_that_fails_leaves_the_old_one_and_no_litter(cache, monkeypatch):
    path = certificates.save(CASE, CPU, CERTIFICATE)
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        certificates.save(CASE, CPU, dataclasses.replace(CERTIFICATE, seconds=9.0))
    monkeypatch.undo()
    os.environ["BATCH_INVARIANT_CACHE"] = str(cache)
    assert certificates.load(CASE, CPU) == CERTIFICATE and list(cache.iterdir()) == [path]


def test_many_processes_that_write_at_once_leave_a_whole_one(cache):
    code = """
import torch
from batch_invariant_ops import certificates
from batch_invariant_ops.certificates import Case, Certificate
for i in range(200):
    certificates.save(Case(48, 64, torch.bfloat16), torch.device("cpu"), Certificate(7, (), None, float(i)))
"""
    root = Path(__file__).resolve().parents[1]
    writers = [subprocess.Popen([sys.executable, "-c", code], cwd=root, env=os.environ) for _ in range(3)]
    while any(writer.poll() is None for writer in writers):
        found = [p for p in cache.glob("gemm-*.json")] if cache.is_dir() else []
        assert all(json.loads(path.read_text())["largest"] == 7 for path in found)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert certificates.load(CASE, CPU).largest == 7 and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"BATCH_INVARIANT_CACHE": "/a/b"}, "/a/b"),
        ({"BATCH_INVARIANT_CACHE": "~/x", "HOME": "/home/u"}, "/home/u/x"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/batch_invariant"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/u"}, "/home/u/.cache/batch_invariant"),
    ],
)
def test_where_they_are_kept(variables, expected, monkeypatch):
    for name in ("BATCH_INVARIANT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert certificates.folder() == Path(expected)


class TestUse:
    """A start goes by a certificate that a few sizes confirm, else by a sample."""

    @pytest.fixture(autouse=True)
    def no_sample(self, monkeypatch):
        monkeypatch.setattr(proving, "sample", lambda case, device: "sampled")

    def test_without_one_a_sample_is_taken(self):
        assert proving.settle(CASE, CPU) == "sampled"

    def test_a_confirmed_one_is_used(self, monkeypatch):
        asked = []
        monkeypatch.setattr(proving, "compare", lambda case, device, sizes: asked.extend(sizes) or [True] * len(sizes))
        certificates.save(CASE, CPU, CERTIFICATE)
        assert proving.settle(CASE, CPU) == CERTIFICATE.window
        assert asked == [5, *range(8, 97, 8), 100]

    def test_one_that_the_vendor_no_longer_keeps_is_not(self, monkeypatch, caplog):
        monkeypatch.setattr(proving, "compare", lambda case, device, sizes: [True] * (len(sizes) - 1) + [False])
        certificates.save(CASE, CPU, CERTIFICATE)
        assert proving.settle(CASE, CPU) == "sampled"
        assert "not those of its certificate" in caplog.text

    def test_one_that_says_no_is_believed(self):
        certificates.save(CASE, CPU, dataclasses.replace(CERTIFICATE, window=None))
        assert proving.settle(CASE, CPU) is None


class TestKeptSample:
    """What a GPU's sample showed at one start is confirmed at the next. The GPU is made up; real ones have a test."""

    GPU = torch.device("cuda", 0)

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch):
        self.kernels = {size: b"large" if size > 300 else b"small" for size in range(1, 20000)}
        self.wrong: set[int] = set()
        self.room = 20000
        self.compared: list[list[int]] = []
        monkeypatch.setattr(certificates, "machine", lambda device: {"device": "made up"})
        monkeypatch.setattr(cublaslt, "ranks", lambda *of: ())
        monkeypatch.setattr(cublaslt, "_allowed", {})
        monkeypatch.setattr(vendor_gemm, "kernel", lambda shape, size: self.kernels[size])
        monkeypatch.setattr(proving, "compare", self.compare)

    def compare(self, case, device, sizes):
        if max(sizes) > self.room:
            raise torch.OutOfMemoryError
        self.compared.append(list(sizes))
        return [size not in self.wrong for size in sizes]

    def settle(self):
        self.compared.clear()
        cublaslt._allowed.clear()
        return proving.settle(CASE, self.GPU)

    def test_the_next_start_looks_at_the_graphs_sizes_alone(self, cache):
        window = self.settle()
        allowed = dict(cublaslt._allowed)
        assert window == Window(1, 16384, len(self.compared[0])) and window.tried > 512
        assert self.settle() == window and self.compared == [list(proving.REPEATED)]
        assert cublaslt._allowed == allowed and [what for _, what in allowed.values()] == [{b"large", b"small"}]
        assert len(list(cache.iterdir())) == 1

    def test_where_the_vendor_runs_a_kernel_that_was_not_in_it_another_is_taken(self, caplog):
        window = self.settle()
        self.kernels[128] = b"another"
        assert self.settle() == window and [len(sizes) for sizes in self.compared] == [window.tried]
        assert "not those of its certificate" in caplog.text
        assert self.settle() == window and self.compared == [list(proving.REPEATED)]

    def test_where_the_bits_are_others_another_is_taken_and_not_kept(self, cache):
        window = self.settle()
        self.wrong = {512}
        assert self.settle() is None and len(self.compared[-1]) == window.tried
        self.wrong = set()
        assert self.settle() == window and self.compared == [list(proving.REPEATED)]

    @pytest.mark.parametrize("wrong", [{16384}, {1}, {3000}])
    def test_one_that_did_not_hold_everywhere_is_not_kept(self, wrong, cache):
        self.wrong = wrong
        self.settle()
        assert not cache.is_dir()

    def test_a_folder_that_cannot_be_written_costs_no_more_than_time(self, monkeypatch):
        monkeypatch.setattr(certificates, "save", Mock(side_effect=PermissionError))
        window = self.settle()
        assert self.settle() == window and [len(sizes) for sizes in self.compared] == [window.tried]

    def test_where_memory_is_short_at_a_start_what_was_kept_before_it_stays(self, caplog):
        window = self.settle()
        self.room = 3000
        assert self.settle().cap == 2048 and self.compared[-1][-1] == 2048
        self.room = 20000
        assert self.settle() == window and self.compared == [list(proving.REPEATED)] and not caplog.records

    def test_where_memory_was_short_at_the_first_start_one_with_more_compares_the_rest(self, caplog):
        window = Window(1, 16384, len(proving.SAMPLE))
        self.room = 3000
        assert self.settle().cap == 2048 and self.compared[-1][-1] == 2048
        self.room = 20000
        self.kernels |= {size: b"largest" for size in range(6000, 20000)}
        again = self.settle()
        assert (again.floor, again.cap) == (1, window.cap) and not caplog.records
        assert cublaslt._allowed == {proving._shape(CASE, self.GPU): (0, {b"small", b"large", b"largest"})}

    def test_one_whose_kernels_cannot_be_read_is_ignored(self, cache, caplog):
        window = self.settle()
        (path,) = cache.iterdir()
        path.write_text(damaged(path.read_text(), kernels=["no number"]))
        assert self.settle() == window and "is ignored: ValueError" in caplog.text

    def test_without_kernels_it_is_none(self, cache, caplog):
        window = self.settle()
        (path,) = cache.iterdir()
        path.write_text(damaged(path.read_text(), kernels=[]))
        assert self.settle() == window and "not a window over every M" in caplog.text


def test_an_exhaustive_proof_names_the_one_size_at_which_a_vendor_lies_in_one_bit(monkeypatch):
    case, honest = Case(48, 64, torch.float32), lambda a, b, bias: torch.stack([row @ b for row in a])

    def liar(a, b, bias):
        y = honest(a, b, bias)
        if len(a) == 37:
            y.view(torch.int32)[18, 3] ^= 1
        return y

    monkeypatch.setattr(vendor_gemm, "call", honest)
    assert proving.exhaustively(case, CPU, 60).disagree == ()
    monkeypatch.setattr(vendor_gemm, "call", liar)
    found = proving.exhaustively(case, CPU, 60)
    assert found.disagree == ((37, 37),) and found.window == Window(38, 60, 23)


@pytest.mark.parametrize(
    "numbers, ranges",
    [([], []), ([3], [(3, 3)]), ([1, 2, 3, 7, 9, 10], [(1, 3), (7, 7), (9, 10)])],
)
def test_ranges(numbers, ranges):
    assert list(proving._ranges(numbers)) == ranges
