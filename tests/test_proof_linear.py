"""The choice between the vendor's GEMM and ours: made by proof, by what is laid out as in it, and never a bit's matter.

The GPU's path runs here on the CPU: both kernels are replaced by ones that compute row by row, and the vendor may lie.
"""

import logging

import pytest
import torch

from batch_invariant_ops import proving
from batch_invariant_ops.certificates import Case
from batch_invariant_ops.ops import cublaslt, linear, matmul, vendor_gemm
from batch_invariant_ops.proof import Window, find_window, probe, same_bits, window_of

N, K = 48, 64
CPU = torch.device("cpu")
SAMPLE = proving.SAMPLE
"""As it is; most tests here take a smaller one."""


def by_rows(a, b, bias=None):
    """fp32 sums in one order for each element, whatever the operands' layout and number."""
    y = (a.float().contiguous()[:, None] * b.float().t().contiguous()[None]).sum(-1)
    return (y if bias is None else y + bias.float()).to(a.dtype)


class Vendor:
    """Counts its calls, and lies in one bit of one element where it is called with ``at`` rows."""

    def __init__(self, at=()):
        self.at = at
        self.rows = []

    def __call__(self, a, b, bias):
        self.rows.append(len(a))
        y = by_rows(a, b, bias)
        if len(a) in self.at:
            y.view(torch.int16)[len(a) // 2, 3] ^= 1
        return y


@pytest.fixture(autouse=True)
def gpu_path(monkeypatch, tmp_path):
    """Our kernel and an honest vendor, both by rows; nothing decided yet; a proof at the first call."""
    monkeypatch.setenv("BATCH_INVARIANT_CACHE", str(tmp_path))
    monkeypatch.delenv("BATCH_INVARIANT_GEMM", raising=False)
    monkeypatch.setattr(matmul, "gemm", by_rows)
    monkeypatch.setattr(linear, "_decisions", {})
    monkeypatch.setattr(linear, "_calls", type(linear._calls)())
    monkeypatch.setattr(linear, "PROVE_AT_CALL", 1)
    monkeypatch.setattr(proving, "SAMPLE", (1, 2, 3, 4, 8, 16, 32, 64, 80))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def vendor(monkeypatch):
    def install(*at):
        made = Vendor(at)
        monkeypatch.setattr(vendor_gemm, "call", made)
        return made

    return install


def values(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def aligned(*shape, seed=0, dtype=torch.bfloat16):
    """Values at an address that is a multiple of 256, as a GPU's allocator gives it."""
    room = torch.zeros(torch.Size(shape).numel() + 256, dtype=dtype)
    start = -room.data_ptr() % 256 // room.element_size()
    y = room[start : start + torch.Size(shape).numel()].view(shape)
    return y.copy_(values(*shape, seed=seed, dtype=dtype))


X, W, BIAS = aligned(100, K), aligned(N, K, seed=1), aligned(N, seed=2)


class TestChoice:
    @pytest.mark.parametrize("bias", [None, BIAS], ids=["no bias", "bias"])
    @pytest.mark.parametrize("m", [1, 2, 63, 80])
    def test_a_proven_vendor_runs(self, m, bias, vendor):
        calls = vendor()
        linear.gemm(X[:m], W.t(), bias)
        calls.rows.clear()
        assert same_bits(linear.gemm(X[:m], W.t(), bias), by_rows(X[:m], W.t(), bias))
        assert calls.rows == [m]

    @pytest.mark.parametrize("at", [2, 80])
    def test_ours_runs_where_the_vendor_has_no_kernel(self, at, vendor, monkeypatch):
        vendor()
        linear.gemm(X[:at], W.t())

        def without(a, b, bias):
            raise cublaslt.NoKernel("none")

        monkeypatch.setattr(vendor_gemm, "call", without)
        assert same_bits(linear.gemm(X[:at], W.t()), by_rows(X[:at], W.t()))

    def test_a_vendor_without_a_kernel_is_not_taken_for_proven(self, monkeypatch, caplog):
        def without(a, b, bias):
            raise cublaslt.NoKernel("cuBLASLt has no kernel without workspace for 80 rows")

        monkeypatch.setattr(vendor_gemm, "call", without)
        with caplog.at_level(logging.INFO):
            assert same_bits(linear.gemm(X[:2], W.t()), by_rows(X[:2], W.t()))
        assert list(linear.windows().values()) == [None]
        assert "no kernel without workspace for 80 rows, our Triton kernel runs" in caplog.text
        linear._decisions.clear()
        monkeypatch.setenv("BATCH_INVARIANT_GEMM", "vendor")
        with pytest.raises(RuntimeError, match=r"vendor: linear N=.*: cuBLASLt has no kernel without workspace"):
            linear.gemm(X[:2], W.t())

    def test_more_rows_than_were_tried_run_on_ours(self, vendor):
        calls = vendor()
        linear.gemm(X[:80], W.t())
        calls.rows.clear()
        assert same_bits(linear.gemm(X, W.t()), by_rows(X, W.t()))
        assert calls.rows == []

    def test_ours_runs_where_the_table_says_that_it_is_faster(self, vendor, monkeypatch):
        monkeypatch.setattr(linear.tiles, "faster", lambda *shape: ((1, 2), (5, 8)))
        monkeypatch.setattr(linear, "HIDDEN", 0)
        calls = vendor()
        linear.gemm(X, W.t())
        calls.rows.clear()
        for m in (1, 2, 3, 4, 5, 8, 9):
            assert same_bits(linear.gemm(X[:m], W.t(), None), by_rows(X[:m], W.t()))
        assert calls.rows == [3, 4, 9]

    @pytest.mark.parametrize("captured", [False, True])
    def test_outside_of_a_graph_ours_runs_only_where_the_gpu_hides_its_launch(self, captured, vendor, monkeypatch):
        monkeypatch.setattr(linear.tiles, "faster", lambda *shape: ((1, 80),))
        monkeypatch.setattr(linear, "FEW_ROWS", 16)
        monkeypatch.setattr(linear, "HIDDEN", N * K * 32)
        calls = vendor()
        linear.gemm(X, W.t())
        calls.rows.clear()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
        for m in (1, 16, 31, 32, 80):
            assert same_bits(linear.gemm(X[:m], W.t(), None), by_rows(X[:m], W.t()))
        assert calls.rows == ([] if captured else [1, 16, 31])

    @pytest.mark.parametrize("how", ["vendor", "layout"])
    def test_the_table_is_not_asked_for_what_it_was_not_measured_with(self, vendor, monkeypatch, how):
        monkeypatch.setattr(linear.tiles, "faster", lambda *shape: ((1, 100),))
        monkeypatch.setattr(linear, "HIDDEN", 0)
        if how == "vendor":
            monkeypatch.setenv("BATCH_INVARIANT_GEMM", "vendor")
        b = W.t() if how == "vendor" else aligned(K, N)
        calls = vendor()
        linear.gemm(X, b)
        calls.rows.clear()
        linear.gemm(X[:8], b)
        assert calls.rows == [8]

    @pytest.mark.parametrize("at", [16, 64, 80])
    def test_a_vendor_that_lies_in_one_bit_at_one_size_is_never_asked_again(self, at, vendor, monkeypatch):
        monkeypatch.setattr(proving, "LARGEST_FLOOR", 16)
        calls = vendor(at)
        linear.gemm(X[:at], W.t())
        assert list(linear.windows().values()) == [None]
        calls.rows.clear()
        assert same_bits(linear.gemm(X[:at], W.t()), by_rows(X[:at], W.t()))
        assert calls.rows == []

    def test_without_the_proof_that_liar_would_have_been_believed(self, vendor, monkeypatch):
        monkeypatch.setattr(proving, "settle", lambda case, device: Window(1, 80, 80))
        vendor(16)
        assert not same_bits(linear.gemm(X[:16], W.t()), by_rows(X[:16], W.t()))

    def test_fewer_rows_than_the_floor_run_on_ours(self, vendor):
        calls = vendor(1, 3)
        linear.gemm(X[:2], W.t())
        assert [window.floor for window in linear.windows().values()] == [4]
        calls.rows.clear()
        assert same_bits(linear.gemm(X[:3], W.t()), by_rows(X[:3], W.t()))
        assert calls.rows == []
        linear.gemm(X[:4], W.t())
        assert calls.rows == [4]

    def test_each_layout_type_and_bias_is_proven_for_itself(self, vendor):
        vendor()
        packed = aligned(K, N)
        for b in (W.t(), packed):
            for bias in (None, BIAS):
                linear.gemm(X, b, bias)
        linear.gemm(aligned(3, K, dtype=torch.float16), aligned(N, K, dtype=torch.float16).t())
        assert len(linear.windows()) == 5

    @pytest.mark.parametrize(
        "a, b, bias",
        [
            (aligned(100, 2 * K)[:, ::2], W.t(), None),
            (aligned(K, 100).t(), W.t(), None),
            (aligned(101 * K)[8 : 8 + 100 * K].view(100, K), W.t(), None),
            (X, aligned(N, 2 * K)[:, ::2].t(), None),
            (X, aligned(N * K + 8)[8:].view(N, K).t(), None),
            (X, W.t(), aligned(2 * N)[::2]),
            (X, W.t(), aligned(N + 8)[8:]),
            (aligned(100, 1), aligned(N, 1).t(), None),
            (X[:0], W.t(), None),
        ],
        ids=[
            *("strided rows", "transposed rows", "misaligned rows", "strided weight", "misaligned weight"),
            *("strided bias", "misaligned bias", "one step", "no rows"),
        ],
    )
    def test_what_is_not_laid_out_as_in_the_proof_runs_on_ours(self, a, b, bias, vendor):
        calls = vendor()
        assert same_bits(linear.gemm(a, b, bias), by_rows(a, b, bias))
        assert calls.rows == [] and linear.windows() == {}

    def test_one_row_is_packed_whatever_its_stride(self, vendor):
        calls = vendor()
        row = aligned(5, 2 * K)[4:, :K]
        assert row.stride() == (2 * K, 1)
        assert same_bits(linear.gemm(row, W.t()), by_rows(row, W.t()))
        assert calls.rows[-1] == 1

    def test_tf32_is_not_taken_for_proven(self, vendor):
        calls = vendor()
        a, b = aligned(8, K, dtype=torch.float32), aligned(N, K, dtype=torch.float32).t()
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            linear.gemm(a, b)
            assert calls.rows == []
        finally:
            torch.backends.cuda.matmul.fp32_precision = "ieee"
        linear.gemm(a, b)
        assert calls.rows

    def test_a_proof_waits_until_it_is_worth_it(self, vendor, monkeypatch):
        monkeypatch.setattr(linear, "PROVE_AT_CALL", 3)
        calls = vendor()
        made = [bool(linear.gemm(X, W.t()).numel() and linear.windows()) for _ in range(4)]
        assert made == [False, False, True, True] and calls.rows

    def test_none_is_made_while_a_graph_is_captured_and_none_is_given_up(self, vendor, monkeypatch):
        calls = vendor()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        linear.gemm(X, W.t())
        assert calls.rows == [] and linear.windows() == {}
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        linear.gemm(X, W.t())
        assert calls.rows


class TestAsked:
    def test_triton_never_runs_the_vendor(self, vendor, monkeypatch):
        monkeypatch.setenv("BATCH_INVARIANT_GEMM", "triton")
        calls = vendor()
        linear.gemm(X, W.t())
        linear.gemm(X, W.t())
        assert calls.rows == []

    def test_vendor_stops_where_it_is_not_proven(self, vendor, monkeypatch):
        monkeypatch.setenv("BATCH_INVARIANT_GEMM", "vendor")
        vendor(80)
        with pytest.raises(RuntimeError, match="BATCH_INVARIANT_GEMM=vendor: linear N=48 K=64 bfloat16: the vendor's"):
            linear.gemm(X, W.t())

    def test_another_value_is_refused(self, vendor, monkeypatch):
        monkeypatch.setenv("BATCH_INVARIANT_GEMM", "cutlass")
        vendor()
        with pytest.raises(ValueError, match="'cutlass' is not valid: one of auto, vendor, triton is needed"):
            linear.gemm(X, W.t())


class TestOddWidth:
    def test_a_weight_with_room_behind_it_runs_wider_and_keeps_its_bits(self, vendor):
        calls = vendor()
        w, bias = aligned(48, K)[:45], aligned(48)[:45]
        y = linear.gemm(X[:16], w.t(), bias)
        assert same_bits(y, by_rows(X[:16], w.t(), bias)) and y.is_contiguous() and y.shape == (16, 45)
        assert [key[0] for key in linear.windows()] == [48] and calls.rows[-1] == 16

    @pytest.mark.parametrize("w, bias", [(values(45, K), None), (aligned(48, K)[:45], values(45))])
    def test_one_without_is_left_as_it_is(self, w, bias):
        assert linear._widened(w.t(), bias) is None

    def test_room_is_made_without_a_change_that_shows(self):
        weight = torch.nn.Parameter(values(45, K))
        before = weight.detach().clone()
        linear._append_room(weight)
        assert same_bits(weight.detach(), before) and weight.is_contiguous() and weight.requires_grad
        wide, _ = linear._widened(weight.detach().t(), None)
        assert wide.shape == (K, 48) and bool((wide[:, 45:] == 0).all())

    def test_a_view_of_another_tensor_is_not_moved(self):
        whole = values(50, K)
        for view in (whole[:45], whole[5:], whole.t()):
            at = view.data_ptr()
            linear._append_room(view)
            assert view.data_ptr() == at

    def test_new_values_in_place_are_what_is_computed_with(self, vendor):
        vendor()
        weight = torch.nn.Parameter(values(45, K))
        linear._append_room(weight)
        linear.gemm(X, weight.detach().t())
        with torch.no_grad():
            weight.copy_(values(45, K, seed=9))
        assert same_bits(linear.gemm(X, weight.detach().t()), by_rows(X, values(45, K, seed=9).t()))


class TestSample:
    def test_too_little_memory_is_met_with_fewer_rows_then_with_our_kernel(self, monkeypatch, caplog):
        asked = []

        def compare(case, device, sizes):
            asked.append(sizes[-1])
            if sizes[-1] > limit:
                raise torch.OutOfMemoryError
            return [True] * len(sizes)

        monkeypatch.setattr(proving, "compare", compare)
        monkeypatch.setattr(proving, "SAMPLE", (1, 512, 1024, 2048, 4096, 8192))
        limit = 2048
        assert proving.sample(Case(N, K, torch.bfloat16), CPU) == Window(1, 2048, 4)
        assert asked == [8192, 4096, 2048]
        limit = 100
        assert proving.sample(Case(N, K, torch.bfloat16), CPU) is None
        assert "too little memory" in caplog.text

    def test_it_covers_what_a_server_runs(self):
        assert {*range(1, 513), 1024, 2048, 8192} <= {*SAMPLE} and [*SAMPLE] == sorted({*SAMPLE})


class TestProbe:
    @staticmethod
    def in_order(x, w, parts):
        sums = []
        for low, high in parts:
            total = torch.zeros(len(x), len(w))
            for k in range(low, high, 16):
                total = total + x[:, k : k + 16].float() @ w[:, k : k + 16].float().t()
            sums.append(total)
        return sum(sums[1:], sums[0]).to(x.dtype)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("k", [128, 896, 4096])
    def test_nearly_every_element_tells_one_order_from_another(self, dtype, k):
        x, w, _ = probe(8, 64, k, dtype, CPU)
        whole, split = (self.in_order(x, w, parts) for parts in ([(0, k)], [(0, k // 2), (k // 2, k)]))
        assert (whole != split)[::2].float().mean() > (0.25 if k < 500 else 0.8)
        assert bool(whole.isfinite().all())

    def test_random_numbers_tell_hardly_any(self):
        x, w = values(8, 4096), values(64, 4096, seed=1)
        whole, split = (self.in_order(x, w, parts) for parts in ([(0, 4096)], [(0, 2048), (2048, 4096)]))
        assert (whole != split).float().mean() < 0.02

    @pytest.mark.parametrize("k", [1, 2, 3, 17])
    def test_short_sums_are_probed_by_plain_numbers_too(self, k):
        x, w, bias = probe(6, 5, k, torch.bfloat16, CPU, has_bias=True)
        assert (x.shape, w.shape, bias.shape) == ((6, k), (5, k), (5,))
        assert bool((x[1::2] != 0).any())


def test_rows_enough_are_compared_to_find_a_rare_difference():
    """A vendor whose single row differs in one place of 64 only."""

    def gemm(rows):
        y = rows.clone()
        if len(rows) == 1 and bool(rows[0, 0] == 33):
            y += 1
        return y

    x = torch.arange(64.0)[:, None].expand(64, 3).contiguous()
    assert find_window(gemm, x, x, [1, 2, 64], 16).floor == 1
    assert find_window(gemm, x, x, [1, 2, 64], 16, least_rows=64).floor == 2


def test_no_verdicts_make_no_window():
    assert window_of([], [], 64) is None


class TestEachKernel:
    """A sample has an M for each of the kernels that a vendor on a GPU has up to its largest."""

    CASE = Case(N, K, torch.bfloat16)
    GPU = torch.device("cuda", 0)

    def sizes(self, monkeypatch, kernel, sizes, above=0, **bound):
        monkeypatch.setattr(vendor_gemm, "kernel", lambda shape, size: kernel(size))
        monkeypatch.setattr(proving, "SAMPLE", sizes)
        return proving.sizes_of(self.CASE, self.GPU, above, **bound)

    def test_a_kernel_that_none_of_them_runs_is_added_once(self, monkeypatch):
        kernels = {700: b"b", 704: b"b", 768: b"c", 832: b"c", 896: b"b"}
        sizes = [1, 2, 512, 700, 1000]
        assert self.sizes(monkeypatch, lambda size: kernels.get(size, b"a"), sizes) == [1, 2, 512, 700, 768, 1000]
        assert self.sizes(monkeypatch, lambda size: kernels.get(size, b"a"), sizes, 769) == [832, 896, 1000]

    def test_a_kernel_of_odd_numbers_of_rows_is_added_and_others_do_not_run_there(self, monkeypatch):
        allowed = {}
        monkeypatch.setattr(cublaslt, "_allowed", allowed)
        monkeypatch.setattr(proving, "_keep", lambda *kept: None)
        monkeypatch.setattr(proving, "compare", lambda case, device, sizes: [True] * len(sizes))
        kernels = {799: b"b", 801: b"c"}
        sizes = self.sizes(monkeypatch, lambda size: kernels.get(size, b"a" if size < 1000 else None), [1, 512, 1000])
        assert sizes == [1, 512, 799, 1000]
        assert proving.sample(self.CASE, self.GPU) == Window(1, 1000, 4)
        assert allowed == {(N, K, torch.bfloat16, False, True, 0): (0, {b"a", b"b"})}

    def test_where_nobody_tells_and_where_there_is_none_nothing_is_added(self, monkeypatch):
        assert self.sizes(monkeypatch, lambda size: None, [1, 2, 1000]) == [1, 2, 1000]
        assert self.sizes(monkeypatch, lambda size: b"a" if size < 600 else None, [1, 1000]) == [1, 1000]
        assert self.sizes(monkeypatch, lambda size: b"a", [1, 1000], above=1000) == []

    def test_a_kernel_of_more_rows_than_are_asked_for_does_not_stand_for_one_of_fewer(self, monkeypatch):
        kernels = {768: b"b", 1000: b"b"}
        found = self.sizes(monkeypatch, lambda size: kernels.get(size, b"a"), [1, 512, 800, 1000], largest=900)
        assert found == [1, 512, 768, 800]

    def test_on_a_cpu_nothing_is_asked(self, monkeypatch):
        monkeypatch.delattr(vendor_gemm, "kernel")
        assert proving.sizes_of(self.CASE, CPU) == [1, 2, 3, 4, 8, 16, 32, 64, 80]

    def test_a_vendor_that_lies_by_one_kernel_between_the_sizes_is_found(self, monkeypatch):
        """Of the sample's own sizes none is near 4800; the kernel that lies runs there alone."""
        compared = []

        def compare(case, device, sizes, progress=None):
            compared.extend(sizes)
            return [not 4700 < size < 4900 for size in sizes]

        monkeypatch.setattr(proving, "SAMPLE", SAMPLE)
        monkeypatch.setattr(proving, "compare", compare)
        monkeypatch.setattr(vendor_gemm, "kernel", lambda shape, size: b"liar" if 4700 < size < 4900 else b"honest")
        assert proving.sample(self.CASE, self.GPU) is None and 4735 in compared
        monkeypatch.setattr(vendor_gemm, "kernel", lambda shape, size: None)
        assert proving.sample(self.CASE, self.GPU) is not None
