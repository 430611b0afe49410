"""What worked without the mode works in it: aten's own results and errors wherever we do not compute."""

import pytest
import torch
from torch.nn import functional as F

import batch_invariant_ops as ours

NANS = torch.full((5, 5), torch.nan)


@pytest.fixture
def mode():
    with ours.set_batch_invariant_mode():
        yield


def values(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outcome(run):
    """What ``run`` returned, or the error it raised."""
    try:
        return run()
    except Exception as error:
        return type(error), str(error)


def alike(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device) and torch.equal(
            a.nan_to_num(7.0), b.nan_to_num(7.0)
        )
    return a == b


NOT_OURS = {
    "fp64 mm": lambda: torch.mm(values(3, 4).double(), values(4, 5).double()),
    "fp64 addmm": lambda: torch.addmm(values(5).double(), values(3, 4).double(), values(4, 5).double()),
    "fp64 bmm": lambda: torch.bmm(values(2, 3, 4).double(), values(2, 4, 5).double()),
    "fp64 baddbmm": lambda: torch.baddbmm(
        values(5).double(), values(2, 3, 4).double(), values(2, 4, 5).double(), beta=2
    ),
    "fp64 softmax": lambda: values(3, 4).double().softmax(-1),
    "fp64 log_softmax": lambda: values(3, 4).double().log_softmax(0),
    "fp64 mean": lambda: values(3, 4).double().mean((0, 1)),
    "mean in fp64": lambda: values(3, 4).mean(1, dtype=torch.float64),
    "integer mm": lambda: torch.arange(12).view(3, 4) @ torch.arange(20).view(4, 5),
    "integer bmm": lambda: torch.arange(24).view(2, 3, 4).bmm(torch.arange(40).view(2, 4, 5)),
    "integer mean": lambda: torch.arange(6).view(2, 3).mean(1),
    "integer mean as fp32": lambda: torch.arange(6).view(2, 3).mean(1, dtype=torch.float32),
    "integer softmax": lambda: torch.arange(3).softmax(0),
    "integer softmax as fp32": lambda: torch.ones(4, dtype=torch.int64).softmax(0, dtype=torch.float32),
    "bool mm": lambda: torch.ones(2, 2, dtype=torch.bool) @ torch.ones(2, 2, dtype=torch.bool),
    "complex mm": lambda: torch.complex(values(3, 4), values(3, 4, seed=1)) @ values(4, 5).to(torch.complex64),
    "complex addmm": lambda: torch.addmm(torch.ones(5) + 0j, values(3, 4) + 1j, values(4, 5) + 0j, alpha=2j, beta=1j),
    "complex mean": lambda: (values(3, 4) + 1j).mean(1),
    "mixed types": lambda: torch.mm(values(3, 4), values(4, 5).half()),
    "mixed types of the bias": lambda: torch.addmm(values(5).double(), values(3, 4), values(4, 5)),
    "mixed devices": lambda: torch.mm(values(3, 4), torch.empty(4, 5, device="meta")).shape,
    "mixed devices of a layer": lambda: F.linear(values(3, 4), values(5, 4), torch.empty(5, device="meta")).shape,
    "meta tensors": lambda: torch.mm(torch.empty(3, 4, device="meta"), torch.empty(4, 5, device="meta")).shape,
    "shapes of mm": lambda: torch.mm(torch.ones(2, 3), torch.ones(4, 5)),
    "dimensions of mm": lambda: torch.mm(torch.ones(3), torch.ones(3, 5)),
    "shapes of addmm": lambda: torch.addmm(torch.ones(4), torch.ones(2, 3), torch.ones(3, 5)),
    "bias of addmm with three dimensions": lambda: torch.addmm(torch.ones(1, 2, 5), torch.ones(2, 3), torch.ones(3, 5)),
    "shapes of bmm": lambda: torch.bmm(torch.ones(2, 3, 4), torch.ones(3, 4, 5)),
    "depth of bmm": lambda: torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 5, 4)),
    "shapes of baddbmm": lambda: torch.baddbmm(torch.ones(4), torch.ones(2, 3, 4), torch.ones(2, 4, 5)),
    "shapes of linear": lambda: F.linear(torch.ones(2, 3), torch.ones(5, 4)),
    "dimension of softmax": lambda: torch.ones(2, 3).softmax(2),
    "dimension of mean": lambda: torch.ones(2, 3).mean(5),
    "dimension of mean twice": lambda: torch.ones(2, 3).mean((0, -2)),
    "out of another type": lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 5), out=torch.ones(2, 5).half()),
    "out of mean of another type": lambda: torch.mean(torch.ones(2, 3), 1, out=torch.ones(2, dtype=torch.double)),
    "in place on another shape": lambda: torch.ones(5).addmm_(torch.ones(2, 3), torch.ones(3, 5)),
    "fp64 bias in place": lambda: torch.ones(2, 5).double().addmm_(torch.ones(2, 3), torch.ones(3, 5)),
    "sparse mm": lambda: torch.mm(torch.eye(3).to_sparse(), values(3, 4)),
}
EDGES = {
    "no rows": lambda: torch.mm(torch.ones(0, 4), torch.ones(4, 5)),
    "no columns": lambda: torch.mm(torch.ones(3, 4), torch.ones(4, 0)),
    "no depth": lambda: torch.mm(torch.ones(3, 0), torch.ones(0, 5)),
    "no depth with bias": lambda: torch.addmm(torch.arange(5.0), torch.ones(3, 0), torch.ones(0, 5)),
    "no depth, scaled": lambda: torch.addmm(torch.arange(5.0), torch.ones(3, 0), torch.ones(0, 5), beta=3, alpha=2),
    "no entries": lambda: torch.bmm(torch.ones(0, 3, 4), torch.ones(0, 4, 5)),
    "no depth in bmm": lambda: torch.bmm(torch.ones(2, 3, 0), torch.ones(2, 0, 5)),
    "no depth in baddbmm": lambda: torch.baddbmm(torch.ones(5), torch.ones(2, 3, 0), torch.ones(2, 0, 5)),
    "alpha zero leaves NaN out": lambda: torch.addmm(torch.ones(5), NANS, torch.ones(5, 5), alpha=0),
    "beta zero leaves NaN out": lambda: torch.addmm(NANS, torch.ones(5, 4), torch.ones(4, 5), beta=0),
    "beta zero in place": lambda: torch.full((3, 5), torch.nan).addmm_(torch.ones(3, 4), torch.ones(4, 5), beta=0),
    "bias of size one": lambda: torch.addmm(torch.tensor([2.0]), torch.ones(3, 4), torch.ones(4, 5)),
    "bias of one column": lambda: torch.addmm(torch.arange(3.0)[:, None], torch.ones(3, 4), torch.ones(4, 5)),
    "bias of one row": lambda: torch.addmm(torch.arange(5.0)[None], torch.ones(3, 4), torch.ones(4, 5)),
    "a scalar as bias": lambda: torch.addmm(torch.tensor(2.0), torch.ones(3, 4), torch.ones(4, 5)),
    "one row": lambda: torch.addmm(torch.arange(5.0)[None], torch.ones(1, 4), torch.ones(4, 5)),
    "vectors": lambda: torch.ones(4) @ torch.ones(4),
    "matrix and vector": lambda: torch.ones(3, 4) @ torch.ones(4),
    "vector and matrix": lambda: torch.ones(4) @ torch.ones(4, 5),
    "linear of a vector": lambda: F.linear(torch.ones(4), torch.ones(5, 4), torch.ones(5)),
    "softmax of a scalar": lambda: torch.tensor(3.0).softmax(0),
    "log_softmax of a scalar": lambda: torch.tensor(3.0).log_softmax(-1),
    "mean of a scalar": lambda: torch.tensor(3.0).mean(),
    "mean of a scalar over its dimension": lambda: torch.tensor(3.0).mean(0),
    "mean of a vector": lambda: torch.arange(8.0).mean(),
    "mean of nothing": lambda: torch.ones(2, 0).mean(1),
    "mean of no rows": lambda: torch.ones(0, 2).mean(1),
    "mean of all of nothing": lambda: torch.ones(0, 2).mean(),
    "mean over everything": lambda: torch.arange(8.0).view(2, 4).mean(),
    "mean over no dimensions": lambda: torch.arange(8.0).view(2, 4).mean(()),
    "mean, kept": lambda: torch.arange(8.0).view(2, 4).mean((0, 1), keepdim=True),
    "softmax of nothing": lambda: torch.ones(2, 0).softmax(1),
    "softmax of no rows": lambda: torch.ones(0, 2).softmax(1),
    "softmax of equal values": lambda: torch.ones(2, 4).softmax(0),
    "out is filled and returned": lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 5), out=torch.zeros(2, 5)),
    "out is resized": lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 5), out=torch.zeros(0)),
    "out that is strided": lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 5), out=torch.zeros(5, 2).t()),
    "out of mean": lambda: torch.mean(torch.arange(8.0).view(2, 4), 1, out=torch.zeros(2)),
    "out of softmax": lambda: torch.softmax(torch.ones(2, 4), 1, out=torch.zeros(2, 4)),
    "out of bmm": lambda: torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 4, 5), out=torch.zeros(2, 3, 5)),
    "out of addmm": lambda: torch.addmm(torch.ones(5), torch.ones(3, 4), torch.ones(4, 5), out=torch.zeros(3, 5)),
    "negative beta in place": lambda: torch.ones(2, 5).addmm_(torch.ones(2, 3), torch.ones(3, 5), beta=-2, alpha=0.5),
    "linear into a strided result": lambda: F.linear(torch.ones(2, 3, 4).transpose(0, 1), torch.ones(5, 4)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
class TestWhatWorkedStillWorks:
    @pytest.mark.parametrize("name", [*NOT_OURS, *EDGES])
    def test_results_and_errors_are_those_without_the_mode(self, name):
        run = (NOT_OURS | EDGES)[name]
        plain = outcome(run)
        with ours.set_batch_invariant_mode():
            assert alike(outcome(run), plain), (outcome(run), plain)

    def test_the_comparison_finds_another_type_shape_value_and_error(self):
        one = torch.ones(2)
        for other in (one.half(), one[:1], one * 2, (RuntimeError, "no")):
            assert not alike(one, other)

    def test_out_is_the_tensor_that_comes_back(self, mode):
        out = torch.zeros(2, 5)
        assert torch.mm(torch.ones(2, 3), torch.ones(3, 5), out=out) is out
        assert bool((out == 3).all())

    def test_in_place_changes_the_tensor_and_a_view_of_it(self, mode):
        whole = torch.zeros(4, 5)
        whole[1:3].addmm_(torch.ones(2, 3), torch.ones(3, 5))
        assert whole.sum(1).tolist() == [0, 15, 15, 0]

    def test_out_that_is_also_an_input(self, mode):
        x = values(4, 4)
        expected = x.double() @ x.double()
        assert torch.allclose(torch.mm(x, x, out=x).double(), expected, atol=1e-5)

    def test_second_derivatives(self, mode):
        def f(x):
            return (torch.mm(x, x).softmax(-1) * values(4, 4)).sum()

        x = values(4, 4)
        with ours.set_batch_invariant_mode(False):
            plain = torch.autograd.functional.hessian(f, x)
        assert torch.allclose(torch.autograd.functional.hessian(f, x), plain, atol=1e-4)

    def test_vmap_and_functional_gradients(self, mode):
        x, w = values(3, 5, 4), values(4, 6, seed=1)
        assert torch.allclose(torch.vmap(lambda one: one @ w)(x), x @ w, atol=1e-5)
        per_row = torch.func.vmap(torch.func.grad(lambda row: (row @ w).square().sum()))(x[0])
        assert torch.allclose(per_row, 2 * (x[0] @ w) @ w.t(), atol=1e-4)

    def test_autocast(self, mode):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.mm(values(3, 4), values(4, 5))
        assert y.dtype == torch.bfloat16

    def test_inference_mode_and_no_grad(self, mode):
        for context in (torch.inference_mode(), torch.no_grad()):
            with context:
                assert torch.mm(torch.ones(2, 3), torch.ones(3, 2)).sum() == 12

    def test_conjugate_and_negative_views_are_resolved(self, mode):
        z = torch.complex(values(4, 4), values(4, 4, seed=1))
        imaginary = z.conj().imag
        assert imaginary.is_neg()
        assert torch.allclose(imaginary @ values(4, 3), -(z.imag @ values(4, 3)), atol=1e-6)
