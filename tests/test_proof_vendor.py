"""The settings that a proof needs are made before the first handle, kept, and missed when they are gone."""

import os

import pytest
import torch

from batch_invariant_ops import vendor
from batch_invariant_ops.ops import cublaslt, vendor_gemm


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    for name in vendor.WORKSPACES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(vendor, "_asked_for", {})
    matmul = torch.backends.cuda.matmul
    yield
    matmul.allow_bf16_reduced_precision_reduction = True
    matmul.allow_fp16_reduced_precision_reduction = True
    matmul.fp32_precision = "none"


def test_everything_is_set(monkeypatch):
    vendor.prepare()
    matmul = torch.backends.cuda.matmul
    assert not matmul.allow_bf16_reduced_precision_reduction_split_k
    assert not matmul.allow_fp16_reduced_precision_reduction_split_k
    assert matmul.fp32_precision == "ieee" and vendor.unsettled() == []


def test_settings_that_come_too_late_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match=r"CUDA was used before CUBLAS_WORKSPACE_CONFIG=:16:8 and CUBLASLT_WORK"):
        vendor.prepare()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with pytest.raises(RuntimeError, match=r"CUDA was used before CUBLASLT_WORKSPACE_SIZE=1 was set"):
        vendor.prepare()
    monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", "1")
    vendor.prepare()


def test_a_users_own_workspace_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    vendor.set_environment()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")  # as vLLM's own mode does in between
    vendor.prepare()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda m: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), "fp32_precision is 'tf32'"),
        (lambda m: setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", True), "fp16_accumulation is True"),
        (lambda m: m.setenv("CUBLASLT_WORKSPACE_SIZE", "32768"), "CUBLASLT_WORKSPACE_SIZE is '32768', not '1'"),
        (lambda m: m.delenv("CUBLASLT_WORKSPACE_SIZE"), "CUBLASLT_WORKSPACE_SIZE is None, not '1'"),
    ],
)
def test_a_setting_that_was_changed_since_is_named(change, said, monkeypatch):
    vendor.prepare()
    change(monkeypatch)
    try:
        (found,) = vendor.unsettled()
        assert said in found
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False


def test_where_cublaslt_cannot_be_called_torch_calls_it(monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    for cached in (cublaslt.library, cublaslt.version):
        cached.cache_clear()
    try:
        assert cublaslt.library() is None and "libcublasLt.so.99" in caplog.text
        assert cublaslt.version() == "of CUDA 99.0"
        assert vendor_gemm.name(torch.device("cuda")) == "aten"
    finally:
        monkeypatch.undo()
        for cached in (cublaslt.library, cublaslt.version):
            cached.cache_clear()


def test_aten_has_one_kernel():
    x, w = torch.ones(3, 8), torch.ones(8, 5)
    assert vendor_gemm.call(x, w, None, 0).tolist() == vendor_gemm.call(x, w, None).tolist() == [[8.0] * 5] * 3
    with pytest.raises(cublaslt.NoKernel, match="aten has one kernel"):
        vendor_gemm.call(x, w, None, 1)
