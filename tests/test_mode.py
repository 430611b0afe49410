"""The mode: what it changes, what it leaves alone, and that it comes and goes without a trace."""

import threading

import pytest
import torch
from torch.nn import functional as F

import batch_invariant_ops as ours
from batch_invariant_ops.ops import matmul
from batch_invariant_ops.proof import same_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 64, 100]


@pytest.fixture
def mode():
    with ours.set_batch_invariant_mode():
        yield


@pytest.fixture(autouse=True)
def mode_is_off_around_every_test():
    assert not ours.is_batch_invariant_mode_enabled()
    yield
    assert not ours.is_batch_invariant_mode_enabled()


def values(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def runs_on_ours(monkeypatch):
    """Whether ``torch.mm`` reaches our GEMM now."""
    reached = []
    monkeypatch.setattr(matmul, "_on_cpu", lambda a, b, bias: reached.append(1) or torch.zeros(1, 2, 2))
    torch.mm(torch.ones(2, 3), torch.ones(3, 2))
    monkeypatch.undo()
    return bool(reached)


class TestSwitching:
    def test_a_block_turns_it_on_and_off(self, monkeypatch):
        assert not runs_on_ours(monkeypatch)
        with ours.set_batch_invariant_mode():
            assert ours.is_batch_invariant_mode_enabled() and runs_on_ours(monkeypatch)
        assert not ours.is_batch_invariant_mode_enabled() and not runs_on_ours(monkeypatch)

    def test_blocks_nest_and_each_restores_what_was_before(self, monkeypatch):
        with ours.set_batch_invariant_mode(True):
            with ours.set_batch_invariant_mode(False):
                assert not ours.is_batch_invariant_mode_enabled() and not runs_on_ours(monkeypatch)
                with ours.set_batch_invariant_mode(True):
                    assert runs_on_ours(monkeypatch)
                assert not runs_on_ours(monkeypatch)
            with ours.set_batch_invariant_mode(True):
                pass
            assert ours.is_batch_invariant_mode_enabled() and runs_on_ours(monkeypatch)

    @pytest.mark.parametrize("enabled", [True, False])
    def test_an_exception_restores_it_and_passes_through(self, enabled, monkeypatch):
        with ours.set_batch_invariant_mode(not enabled):
            with pytest.raises(KeyError, match="from the block"), ours.set_batch_invariant_mode(enabled):
                raise KeyError("from the block")
            assert runs_on_ours(monkeypatch) is not enabled

    def test_an_error_of_aten_inside_leaves_the_mode_usable(self, monkeypatch):
        with ours.set_batch_invariant_mode():
            with pytest.raises(RuntimeError, match="cannot be multiplied"):
                torch.mm(torch.ones(2, 3), torch.ones(4, 5))
            assert runs_on_ours(monkeypatch)

    def test_enable_and_disable_may_be_called_twice(self, monkeypatch):
        ours.enable_batch_invariant_mode()
        ours.enable_batch_invariant_mode()
        assert runs_on_ours(monkeypatch)
        ours.disable_batch_invariant_mode()
        ours.disable_batch_invariant_mode()
        assert not runs_on_ours(monkeypatch)

    def test_it_can_be_switched_many_times(self, monkeypatch):
        plain = torch.mm(values(5, 40), values(40, 7, seed=1))
        for _ in range(50):
            with ours.set_batch_invariant_mode():
                pass
        assert same_bits(torch.mm(values(5, 40), values(40, 7, seed=1)), plain)

    def test_it_belongs_to_the_process(self, monkeypatch):
        seen = []
        with ours.set_batch_invariant_mode():
            thread = threading.Thread(target=lambda: seen.append(ours.is_batch_invariant_mode_enabled()))
            thread.start()
            thread.join()
        assert seen == [True]

    def test_turning_it_on_says_nothing(self, recwarn):
        with ours.set_batch_invariant_mode():
            torch.mm(torch.ones(2, 3), torch.ones(3, 2))
        assert not [str(w.message) for w in recwarn]


K, N = 257, 130
OPERATIONS = {
    "mm": lambda x, w, b: torch.mm(x, w),
    "@": lambda x, w, b: x @ w,
    "mm out": lambda x, w, b: torch.mm(x, w, out=x.new_empty(len(x), N)),
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
    "addmm, a matrix, scaled": lambda x, w, b: torch.addmm(b.expand(len(x), N), x, w, beta=0.5, alpha=2),
    "addmm in place": lambda x, w, b: x.new_ones(len(x), N).addmm_(x, w),
    "bmm": lambda x, w, b: torch.bmm(x.expand(2, -1, -1), w.expand(2, -1, -1))[1],
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x[None], w[None])[0],
    "baddbmm in place": lambda x, w, b: x.new_ones(1, len(x), N).baddbmm_(x[None], w[None], alpha=0.5)[0],
    "F.linear": lambda x, w, b: F.linear(x, w.t(), b),
    "F.linear, no bias": lambda x, w, b: F.linear(x, w.t()),
    "F.linear, three dimensions": lambda x, w, b: F.linear(x[:, None], w.t(), b)[:, 0],
    "einsum": lambda x, w, b: torch.einsum("mk,kn->mn", x, w),
    "einsum, batched": lambda x, w, b: torch.einsum("zmk,zkn->zmn", x[None], w[None])[0],
    "matmul, three dimensions": lambda x, w, b: torch.matmul(x[None], w)[0],
    "softmax": lambda x, w, b: torch.softmax(x, -1),
    "log_softmax": lambda x, w, b: F.log_softmax(x, dim=1),
    "softmax as fp32": lambda x, w, b: torch.softmax(x, -1, dtype=torch.float32),
    "mean": lambda x, w, b: x.mean(-1),
    "mean of a view": lambda x, w, b: x.unflatten(1, (1, K)).mean((1, 2)),
}


def keeps_bits(operation, x):
    whole = operation(x)
    for size in SIZES:
        last = len(x) - size
        for start in {0, last // 2, last}:
            part = operation(x[start : start + size])
            if not bool(same_bits(part.contiguous(), whole[start : start + size].contiguous())):
                return False
    return True


class TestBits:
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_row_is_the_same_alone_and_in_a_batch(self, name, dtype, mode):
        x, w, b = values(100, K, dtype=dtype), values(K, N, seed=1, dtype=dtype), values(N, seed=2, dtype=dtype)
        assert keeps_bits(lambda rows: OPERATIONS[name](rows, w, b), x)

    @pytest.mark.parametrize("name", ["mm", "addmm", "F.linear", "einsum", "matmul, three dimensions"])
    def test_without_the_mode_the_same_check_fails(self, name):
        x, w, b = values(100, K), values(K, N, seed=1), values(N, seed=2)
        assert not keeps_bits(lambda rows: OPERATIONS[name](rows, w, b), x)

    def test_a_model_of_layers_keeps_them_too(self, mode):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(K, 96), torch.nn.ReLU(), torch.nn.Linear(96, 40)).eval()
        assert keeps_bits(lambda x: model(x).log_softmax(-1), values(100, K))

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_values_are_torchs_up_to_rounding(self, name, dtype):
        x, w, b = values(33, K, dtype=dtype), values(K, N, seed=1, dtype=dtype), values(N, seed=2, dtype=dtype)
        exact = OPERATIONS[name](x.double(), w.double(), b.double()) if "fp32" not in name else x.double().softmax(-1)
        with ours.set_batch_invariant_mode():
            y = OPERATIONS[name](x, w, b)
        eps = torch.finfo(dtype).eps
        # what rounding goes by: the same sums of the operands' absolute values, a factor among them
        positive = [operand.double().abs() for operand in (x, w, b)]
        size = OPERATIONS[name](*positive) if y.shape == (33, N) else exact.abs() + 1
        assert y.dtype == (torch.float32 if "fp32" in name else dtype)
        assert bool(((y.double() - exact).abs() <= 2 * eps * exact.abs() + 2 * eps * size).all())


class TestGradients:
    @pytest.mark.parametrize("name", [name for name in OPERATIONS if "out" not in name and "place" not in name])
    def test_gradients_are_torchs_up_to_rounding(self, name):
        def gradients(mode):
            leaves = [t.requires_grad_() for t in (values(9, K), values(K, N, seed=1), values(N, seed=2))]
            with ours.set_batch_invariant_mode(mode):
                y = OPERATIONS[name](*leaves)
                return torch.autograd.grad((y * values(*y.shape, seed=3)).sum(), leaves, allow_unused=True)

        for a, b in zip(gradients(True), gradients(False), strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4)

    def test_gradients_of_a_row_have_the_bits_of_the_row_alone(self, mode):
        w = values(K, N, seed=1)

        def gradient(x):
            x = x.clone().requires_grad_()
            F.log_softmax(x @ w, -1).square().sum().backward()
            return x.grad

        assert keeps_bits(gradient, values(100, K))
