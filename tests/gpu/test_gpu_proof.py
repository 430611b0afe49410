"""The proof on a real card: it holds where it was seen to hold, and finds a vendor that lies in one bit at one M."""

import logging
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import batch_invariant_ops as ours
from batch_invariant_ops import certificates, proving, tiles
from batch_invariant_ops.certificates import Case
from batch_invariant_ops.ops import cublaslt, linear, matmul, vendor_gemm
from batch_invariant_ops.proof import Window, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[2]
HONEST = vendor_gemm.call
CASE = Case(320, 256, torch.bfloat16)
PROVEN_ON_HOPPER = [
    Case(896, 896, torch.bfloat16),
    Case(1152, 896, torch.bfloat16, has_bias=True),
    Case(9728, 896, torch.float16),
    Case(4096, 4096, torch.bfloat16),
    Case(4096, 14336, torch.float16),
]


@pytest.mark.parametrize("case", PROVEN_ON_HOPPER, ids=str)
def test_the_vendors_bits_are_ours_where_they_were_proven(case):
    window = proving.sample(case, GPU)
    if torch.cuda.get_device_capability() == (9, 0):
        assert window is not None and window.floor == 1 and window.cap == max(proving.SAMPLE)
    if window is not None:
        others = random.Random(0).sample(range(window.floor, window.cap + 1), 40)
        assert all(proving.compare(case, GPU, sorted(others)))


SHAPES = [
    Case(1152, 896, torch.bfloat16, has_bias=True),
    Case(1152, 896, torch.float16, has_bias=True, weight_is_packed=False),
    Case(6144, 4096, torch.bfloat16),
    Case(4096, 1024, torch.float32, weight_is_packed=False),
]


@pytest.mark.skipif(cublaslt.library() is None, reason="torch has no cuBLASLt")
class TestCublaslt:
    @pytest.mark.parametrize("case", SHAPES, ids=str)
    def test_a_kernel_is_asked_for_once_and_serves_all_rows_up_to_the_next_step(self, case, monkeypatch, values):
        x, w = values(1100, case.k, dtype=case.dtype), values(case.n, case.k, dtype=case.dtype, seed=1)
        bias = values(case.n, dtype=case.dtype, seed=2) if case.has_bias else None
        b = w.t() if case.weight_is_packed else w.t().contiguous()
        asked = []
        kernels = cublaslt._Plan._kernels
        monkeypatch.setattr(
            cublaslt._Plan, "_kernels", lambda plan, most: asked.append(plan.num_rows) or kernels(plan, most)
        )
        cublaslt._plan.cache_clear()
        expected = matmul.gemm(x, b, bias)
        for num_rows in (1, 512, 513, 520, 576, 577, 1, 512, 600, 1100):
            y = cublaslt.gemm(x[:num_rows], b, bias)
            assert torch.allclose(y.float(), expected[:num_rows].float(), atol=1e-2 * float(expected.float().std()))
        assert [rows for rows in asked if cublaslt.rounded(rows) == rows] == [1, 512, 544, 576, 608, 1120]

    def test_biases_of_two_threads_do_not_mix(self, values):
        x, w = values(64, 256, dtype=torch.bfloat16), values(320, 256, dtype=torch.bfloat16, seed=1)
        biases = [torch.full((320,), float(i), device=GPU, dtype=torch.bfloat16) for i in range(4)]
        expected = [cublaslt.gemm(x, w.t(), bias) for bias in biases]

        def often(i):
            with torch.cuda.stream(torch.cuda.Stream()):
                return all(bool(same_bits(cublaslt.gemm(x, w.t(), biases[i]), expected[i])) for _ in range(300))

        torch.cuda.synchronize()
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(often, range(4)))

    def test_a_product_without_a_kernel_is_told(self, monkeypatch, values):
        x, w = values(4, 256, dtype=torch.bfloat16), values(328, 256, dtype=torch.bfloat16)
        monkeypatch.setattr(cublaslt, "_COMPUTE_32F", 64)  # in fp16, which there is not for bf16
        cublaslt._operation.cache_clear()
        try:
            with pytest.raises(cublaslt.NoKernel, match="no kernel without workspace for 4 rows"):
                cublaslt.gemm(x, w.t(), None)
        finally:
            cublaslt._operation.cache_clear()

    def test_the_tables_kernel_runs_and_another_has_the_same_bits(self, monkeypatch, values):
        x, w = values(96, 4096, dtype=torch.bfloat16), values(6144, 4096, dtype=torch.bfloat16, seed=1)
        first = cublaslt.gemm(x, w.t(), None, 0)
        asked = []
        kernel = cublaslt._Plan._kernel
        monkeypatch.setattr(cublaslt._Plan, "_kernel", lambda plan, rank: asked.append(rank) or kernel(plan, rank))
        monkeypatch.setattr(tiles, "ranks", lambda *of: ((64, 0), (96, 2)))
        cublaslt._plan.cache_clear()
        assert same_bits(cublaslt.gemm(x, w.t(), None), first) and asked == [2]
        with pytest.raises(cublaslt.NoKernel, match="kernels without workspace for 96 rows"):
            cublaslt.gemm(x, w.t(), None, 1000)
        monkeypatch.setattr(tiles, "ranks", lambda *of: ((96, 1000),))
        cublaslt._plan.cache_clear()
        assert same_bits(cublaslt.gemm(x, w.t(), None), first) and asked == [2, 1000, 1000, 0]
        cublaslt._plan.cache_clear()

    def test_shortly_below_a_measured_m_its_kernel_runs_if_it_is_listed(self, monkeypatch, values):
        shape = (6144, 4096, torch.bfloat16, False, True, 0)
        for measured in (96, 1024):
            monkeypatch.setattr(tiles, "ranks", lambda *of, measured=measured: ((measured, 2),))
            cublaslt._plan.cache_clear()
            fastest = cublaslt.kernel(shape, measured)
            assert fastest == bytes(cublaslt._plan(shape, measured, 2).algorithm.data)
            for num_rows in (measured * 3 // 4, measured - 8, measured // 2):
                rounded = cublaslt.rounded(num_rows)
                listed = [bytes(one.data) for one in cublaslt._plan(shape, rounded, 0)._kernels(cublaslt.KERNELS)]
                near = rounded >= cublaslt.NEAR * measured and fastest in listed
                assert cublaslt.kernel(shape, num_rows) == (fastest if near else listed[0]), num_rows
        cublaslt._plan.cache_clear()

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_on_a_gpu_that_is_not_the_current_one(self, values):
        x, w = values(64, 256, dtype=torch.bfloat16), values(320, 256, dtype=torch.bfloat16, seed=1)
        there = cublaslt.gemm(x.to("cuda:1"), w.to("cuda:1").t(), None)
        assert there.device.index == 1 and torch.cuda.current_device() == 0
        assert same_bits(there.to(GPU), cublaslt.gemm(x, w.t(), None))


def liar(at):
    """The vendor, but for one bit of one element where it is called with ``at`` rows; keeps its calls' rows."""

    def call(a, b, bias):
        call.rows.append(len(a))
        y = HONEST(a, b, bias)
        if len(a) == at:
            y.view(torch.int16)[at // 2, 3] ^= 1
        return y

    call.rows = []
    return call


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path, monkeypatch):
    """What one test proved is not there for the next."""
    monkeypatch.setenv("BATCH_INVARIANT_CACHE", str(tmp_path))


@pytest.fixture
def forgetful():
    """Nothing decided before, nothing kept after."""
    before = dict(linear._decisions)
    linear._decisions.clear()
    linear._calls.clear()
    yield
    linear._decisions.clear()
    linear._calls.clear()
    linear._decisions.update(before)


class TestLiar:
    def test_the_exhaustive_proof_names_the_one_size(self, monkeypatch):
        assert proving.exhaustively(CASE, GPU, 100).window == Window(1, 100, 100)
        monkeypatch.setattr(vendor_gemm, "call", liar(37))
        found = proving.exhaustively(CASE, GPU, 100)
        assert found.disagree == ((37, 37),) and found.window == Window(38, 100, 63)

    @pytest.mark.parametrize("at", [72, 1024, 8192])
    def test_the_sample_refuses_a_vendor_that_lies_at_one_of_its_sizes(self, at, monkeypatch):
        window = proving.sample(CASE, GPU)
        assert window.floor == 1 and window.cap == max(proving.SAMPLE) and window.tried >= len(proving.SAMPLE)
        monkeypatch.setattr(vendor_gemm, "call", liar(at))
        assert proving.sample(CASE, GPU) is None

    def test_the_fallback_gives_the_bits_that_the_vendor_would_have_given(self, monkeypatch, forgetful, values):
        x, w = values(128, 256, dtype=torch.bfloat16), values(320, 256, dtype=torch.bfloat16)
        expected = matmul.gemm(x, w.t())
        linear.prepare(w)
        assert list(linear.windows().values()) != [None] and same_bits(ours.linear(x, w), expected)
        linear._decisions.clear()
        lying = liar(128)
        monkeypatch.setattr(vendor_gemm, "call", lying)
        linear.prepare(w)
        assert list(linear.windows().values()) == [None]
        lying.rows.clear()
        assert same_bits(ours.linear(x, w), expected) and lying.rows == []

    def test_a_liar_at_few_rows_is_not_asked_there(self, monkeypatch, forgetful, values):
        x, w = values(4, 256, dtype=torch.bfloat16), values(320, 256, dtype=torch.bfloat16)
        lying = liar(4)
        monkeypatch.setattr(vendor_gemm, "call", lying)
        linear.prepare(w)
        assert [window.floor for window in linear.windows().values()] == [5]
        lying.rows.clear()
        assert same_bits(ours.linear(x, w), matmul.gemm(x, w.t())) and lying.rows == []
        more = torch.cat([x, x])[:5].contiguous()
        assert same_bits(ours.linear(more, w), matmul.gemm(more, w.t())) and lying.rows == [5]

    def test_a_forced_vendor_that_lies_stops_the_start(self, monkeypatch, forgetful, values):
        monkeypatch.setenv("BATCH_INVARIANT_GEMM", "vendor")
        monkeypatch.setattr(vendor_gemm, "call", liar(512))
        with pytest.raises(RuntimeError, match="BATCH_INVARIANT_GEMM=vendor: linear N=320 K=256 bfloat16"):
            linear.prepare(values(320, 256, dtype=torch.bfloat16))

    def test_a_certificate_that_the_vendor_no_longer_keeps_is_ignored(self, monkeypatch, caplog):
        certificates.save(CASE, GPU, proving.exhaustively(CASE, GPU, 100))
        assert proving.settle(CASE, GPU) == Window(1, max(proving.SAMPLE), 100)
        monkeypatch.setattr(vendor_gemm, "call", liar(100))
        with caplog.at_level(logging.WARNING):
            settled = proving.settle(CASE, GPU)
        assert "not those of its certificate" in caplog.text
        assert settled is None


def test_a_sample_is_kept_and_another_process_confirms_it(monkeypatch):
    window = proving.settle(CASE, GPU)
    (kept,) = certificates.folder().iterdir()
    calls = liar(at=-1)
    monkeypatch.setattr(vendor_gemm, "call", calls)
    monkeypatch.setattr(proving, "sample", None)
    assert proving.settle(CASE, GPU) == window and len(calls.rows) < 3 * len(proving.REPEATED)
    code = f"""
import torch
from batch_invariant_ops import certificates, proving, vendor
vendor.prepare()
proving.sample = None
print(proving.settle(certificates.{CASE!r}, torch.device("cuda", 0)))
"""
    done = python(code, BATCH_INVARIANT_CACHE=str(kept.parent))
    assert done.stdout.strip() == str(window), done.stderr


def test_a_proof_is_made_at_the_third_call_and_once(monkeypatch, forgetful, values):
    made = []
    monkeypatch.setattr(proving, "sample", lambda case, device: made.append(case) or Window(1, 8192, 1))
    x, w = values(4, 256, dtype=torch.bfloat16), values(320, 256, dtype=torch.bfloat16)
    counts = []
    for _ in range(5):
        ours.linear(x, w)
        counts.append(len(made))
    assert counts == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("choice, vendor_runs", [("triton", False), ("auto", True)])
def test_the_users_choice(choice, vendor_runs, monkeypatch, forgetful, values):
    monkeypatch.setenv("BATCH_INVARIANT_GEMM", choice)
    calls = liar(at=-1)
    monkeypatch.setattr(vendor_gemm, "call", calls)
    w = values(320, 256, dtype=torch.bfloat16)
    linear.prepare(w)
    calls.rows.clear()
    ours.linear(values(4, 256, dtype=torch.bfloat16), w)
    assert bool(calls.rows) is vendor_runs


def test_products_in_tf32_are_not_taken_for_proven(forgetful, values):
    x, w = values(40, 256), values(320, 256)
    linear.prepare(w)
    expected = ours.linear(x, w)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        y = ours.linear(x, w)
        assert same_bits(y, matmul.gemm(x, w.t())) and not same_bits(y, expected)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert same_bits(ours.linear(x, w), expected)


def python(code, **env):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CUBLAS")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | env, capture_output=True, text=True, timeout=120
    )


def test_settings_that_come_after_the_first_handle_are_refused():
    code = """
import torch
a = torch.ones(64, 64, device="cuda"); a @ a
from batch_invariant_ops import vendor
try:
    vendor.prepare()
except RuntimeError as error:
    print(error)
"""
    done = python(code)
    assert "CUDA was used before" in done.stdout, done.stdout + done.stderr
    assert python(code, CUBLAS_WORKSPACE_CONFIG=":16:8", CUBLASLT_WORKSPACE_SIZE="1").stdout == ""
