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


class TestWhichKernel:
    """cuBLASLt's answers are made up here, so that each way of choosing is taken; real ones are for the GPU's tests."""

    SHAPE = (6144, 4096, torch.bfloat16, False, True, 0)

    @pytest.fixture
    def chosen(self, monkeypatch):
        """The kernel for a number of rows, by what is listed there, what serves where, and what was measured."""

        def make(listed, serves=lambda kernel, rows: True, measured=()):
            class Plan(cublaslt._Plan):
                def __init__(self, shape, num_rows, rank):
                    self.num_rows, self.index = num_rows, 0
                    self.algorithm = self._algorithm(shape, rank)

                def _kernels(self, most):
                    if not (names := listed(self.num_rows)):
                        raise cublaslt.NoKernel
                    return [cublaslt._Algorithm(data=(ord(name),) * 8) for name in names[:most]]

                def _problem(self):
                    return (self.num_rows,)

            class Library:
                @staticmethod
                def cublasLtMatmulAlgoCheck(rows, found, checked):
                    return 0 if serves(chr(found._obj.data[0]), rows) else 15

            monkeypatch.setattr(cublaslt, "_plan", Plan)
            monkeypatch.setattr(cublaslt, "library", lambda: Library)
            monkeypatch.setattr(cublaslt, "ranks", lambda *of: measured)
            monkeypatch.setattr(cublaslt, "_allowed", {})
            return lambda rows: chr(cublaslt.kernel(self.SHAPE, rows)[0])

        return make

    @pytest.mark.parametrize(
        "rows, kernel",
        [
            (32, "d"),  # as measured
            (30, "d"),  # near, and it is listed
            (24, "d"),
            (23, "a"),  # not near
            (33, "a"),  # beyond all that was measured
        ],
    )
    def test_the_measured_one_runs_there_and_shortly_below(self, chosen, rows, kernel):
        assert chosen(lambda rows: "abcd" if rows == 32 else "adbc", measured=((32, 3),))(rows) == kernel

    def test_one_that_is_not_listed_or_is_cublaslts_first_gives_way_to_its_first_there(self, chosen):
        assert chosen(lambda rows: "bd" if rows == 32 else "ac", measured=((32, 1),))(30) == "a"
        assert chosen(lambda rows: "bd" if rows == 32 else "ab", measured=((32, 0),))(30) == "a"

    def test_a_place_that_is_not_there_is_the_first(self, chosen):
        assert chosen(lambda rows: "ab", measured=((32, 5),))(32) == "a"

    def test_rows_in_between_have_that_of_the_next_number_that_is_asked_for(self, chosen):
        asked = chosen(lambda rows: "ab" if rows % 32 == 0 else "c", measured=((1056, 1),))
        assert [asked(rows) for rows in (512, 513, 1025, 1055, 1056)] == ["a", "a", "b", "b", "b"]

    def test_where_that_does_not_serve_only_what_was_proven_does(self, chosen):
        asked = chosen(lambda rows: "ab" if rows % 32 == 0 else "cab", lambda kernel, rows: rows % 2 == 0)
        assert (asked(1054), asked(1055)) == ("a", "c")
        cublaslt.restrict(self.SHAPE, 0, [bytes(cublaslt._Algorithm(data=(ord(name),) * 8).data) for name in "ab"])
        assert (asked(1054), asked(1055)) == ("a", "a")
        cublaslt.restrict(self.SHAPE, 0, [])
        assert asked(1054) == "a"
        with pytest.raises(cublaslt.NoKernel, match="no kernel that was proven for 1055 rows"):
            asked(1055)
        cublaslt.restrict(self.SHAPE, 1055, [])
        assert asked(1055) == "c"

    def test_there_the_measured_one_is_taken_too_if_it_is_listed(self, chosen):
        asked = chosen(lambda rows: "ab" if rows % 32 == 0 else "cb", lambda kernel, rows: rows % 2 == 0, ((1056, 1),))
        assert asked(1055) == "b"


def test_what_is_asked_for_is_no_less_and_each_is_its_own():
    asked = [cublaslt.rounded(rows) for rows in range(1, 3000)]
    assert asked == sorted(asked) and all(rows <= one < rows + 64 for rows, one in enumerate(asked, 1))
    assert all(cublaslt.rounded(one) == one for one in asked)
    assert asked[511:514] == [512, 544, 544] and asked[2047:2049] == [2048, 2112]
