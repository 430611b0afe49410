"""The operations as torch sees them: sound registrations, and the same bits inside torch.compile."""

import pytest
import torch

from batch_invariant_ops.ops import bmm, linear, log_softmax, mean, rms_norm, softmax, topk
from batch_invariant_ops.proof import same_bits

OURS = torch.ops.batch_invariant_ops


def values(*shape, seed=0, grad=False):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


SAMPLES = {
    "rms_norm": lambda grad: (values(3, 8, grad=grad), values(8, grad=grad), 1e-6),
    "rms_norm, no weight, strided": lambda grad: (values(8, 3, grad=grad).t(), None, 1e-6),
    "fused_add_rms_norm": lambda grad: (
        values(3, 8, grad=grad), values(3, 8, seed=1, grad=grad), values(8, grad=grad), 1e-6,
    ),
    "log_softmax": lambda grad: (values(3, 8, grad=grad), 0),
    "log_softmax, half to float": lambda grad: (values(3, 8, grad=grad).half(), -1, torch.float32),
    "softmax": lambda grad: (values(3, 8, grad=grad), 1),
    "mean": lambda grad: (values(2, 3, 4, grad=grad), [0, 2]),
    "mean, keepdim": lambda grad: (values(2, 3, 4, grad=grad), [], True, torch.float32),
    "gemm": lambda grad: (values(2, 3, 8, grad=grad), values(8, 5, grad=grad), values(5, grad=grad)),
    "gemm, a layer's weight": lambda grad: (values(2, 8, grad=grad), values(5, 8, grad=grad).t(), None),
    "topk": lambda grad: ((10 * values(2, 3, 8)).requires_grad_(grad), 3),  # far apart: a step swaps none
    "bmm": lambda grad: (values(2, 3, 8, grad=grad), values(2, 8, 5, grad=grad)),
}  # fmt: skip


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("grad", [False, True])
def test_registration_passes_torchs_own_check(sample, grad):
    torch.library.opcheck(getattr(OURS, sample.split(",")[0]).default, SAMPLES[sample](grad))


@pytest.mark.parametrize("sample", [name for name in SAMPLES if "half" not in name])
def test_gradients_are_those_of_finite_differences(sample, monkeypatch):
    """In fp32 with wide steps: the operations take no fp64."""
    operation, inputs = getattr(OURS, sample.split(",")[0]), SAMPLES[sample](True)
    leaves = [x for x in inputs if isinstance(x, torch.Tensor)]

    def scalar(*tensors):
        given = iter(tensors)
        result = operation(*(next(given) if isinstance(x, torch.Tensor) else x for x in inputs))
        results = [r for r in (result if isinstance(result, tuple) else (result,)) if r.is_floating_point()]
        return sum((r * torch.arange(r.numel()).view_as(r) / r.numel()).sum() for r in results)

    gradients = torch.autograd.grad(scalar(*leaves), leaves)
    for i, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        step = 0.05 * values(*leaf.shape, seed=7)
        moved = [scalar(*(x + sign * step if j == i else x for j, x in enumerate(leaves))) for sign in (1, -1)]
        assert torch.allclose((moved[0] - moved[1]) / 2, (gradient * step).sum(), rtol=2e-2, atol=2e-3)


COMPILED = {
    "rms_norm": lambda x, w: rms_norm.rms_norm(x * 2, w[0]) + 1,
    "fused_add_rms_norm": lambda x, w: rms_norm.rms_norm(x * 2, w[0], residual=x)[0],
    "log_softmax": lambda x, w: log_softmax.log_softmax(x * 2) + 1,
    "softmax": lambda x, w: softmax.softmax(x * 2) + 1,
    "mean": lambda x, w: mean.mean(x * 2, -1, keepdim=True) + 1,
    "topk": lambda x, w: topk.topk(x * 2, 5)[0] + 1,
    "linear": lambda x, w: linear.linear(x * 2, w) + 1,
    "bmm": lambda x, w: bmm.bmm((x * 2).unsqueeze(1), w.t().expand(len(x), -1, -1)) + 1,
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_code_keeps_the_bits(name, dynamic, random, keeps_bits):
    operation, w, x = COMPILED[name], random(24, 70), random(33, 70)
    torch._dynamo.reset()
    compiled = torch.compile(operation, fullgraph=True, dynamic=dynamic)
    assert keeps_bits(lambda rows: compiled(rows, w), x, [1, 2, 17] if dynamic else [1, 4])
    assert same_bits(compiled(x, w), operation(x, w))
