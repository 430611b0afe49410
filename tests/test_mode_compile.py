"""torch.compile and the mode: compiled code keeps the bits, and is compiled anew when the mode flips."""

import pytest
import torch
from torch.nn import functional as F

import batch_invariant_ops as ours
from batch_invariant_ops.proof import same_bits

K, N = 257, 130
X = torch.randn(100, K, generator=torch.Generator().manual_seed(0))
W = torch.randn(K, N, generator=torch.Generator().manual_seed(1))
BIAS = torch.randn(N, generator=torch.Generator().manual_seed(2))
W_OUT = torch.randn(N, 40, generator=torch.Generator().manual_seed(3)) / 200


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layers(x):
    """Products, a softmax and a mean between elementwise work that a compiler fuses."""
    h = F.gelu(F.linear(x * 2, W.t(), BIAS)) + 1
    p = torch.softmax(h @ W_OUT, -1)
    return torch.log_softmax(p * h.mean(-1, keepdim=True), -1) * 3


def keeps_bits(operation, sizes=(1, 2, 3, 5, 16, 33, 100)):
    whole = operation(X)
    for size in sizes:
        last = len(X) - size
        for start in {0, last // 2, last}:
            if not bool(same_bits(operation(X[start : start + size]), whole[start : start + size])):
                return False
    return True


def test_a_compiled_model_keeps_the_bits_for_any_number_of_rows():
    with ours.set_batch_invariant_mode():
        compiled = torch.compile(layers, fullgraph=True, dynamic=True)
        assert keeps_bits(compiled)


def test_without_the_mode_the_same_check_fails():
    assert not keeps_bits(torch.compile(layers, fullgraph=True, dynamic=True))


def test_products_have_the_bits_of_eager_code():
    with ours.set_batch_invariant_mode():
        for operation in (lambda x: x @ W, lambda x: F.linear(x, W.t(), BIAS), lambda x: x.softmax(-1)):
            assert same_bits(torch.compile(operation, fullgraph=True)(X), operation(X))


def test_compiled_code_is_compiled_again_when_the_mode_flips():
    graphs = []

    def backend(graph, inputs):
        graphs.append(ours.is_batch_invariant_mode_enabled())
        return graph.forward

    compiled = torch.compile(lambda x: x @ W, backend=backend)
    compiled(X)
    compiled(X)
    with ours.set_batch_invariant_mode():
        compiled(X)
        compiled(X)
        with ours.set_batch_invariant_mode():
            compiled(X)
    compiled(X)
    assert graphs == [False, True, False]


def test_code_compiled_before_the_mode_keeps_the_bits_in_it_and_is_plain_again_after_it():
    compiled = torch.compile(lambda x: torch.log_softmax(x @ W, -1), fullgraph=True, dynamic=True)
    before = compiled(X)
    assert not keeps_bits(compiled)
    with ours.set_batch_invariant_mode():
        assert keeps_bits(compiled)
    assert same_bits(compiled(X), before)
    assert not keeps_bits(compiled)


def test_a_compiled_backward_pass_keeps_the_bits_of_a_rows_gradient():
    with ours.set_batch_invariant_mode():
        compiled = torch.compile(layers, fullgraph=True, dynamic=True)

        def gradient(x):
            x = x.clone().requires_grad_()
            compiled(x).square().sum().backward()
            return x.grad

        assert keeps_bits(gradient, (1, 3, 16, 100))


def test_what_is_not_ours_compiles_as_before():
    with ours.set_batch_invariant_mode():
        compiled = torch.compile(lambda x: (x @ x.mT).softmax(-1).mean(0), fullgraph=True)
        x = X[:5].double()
        assert torch.allclose(compiled(x), (x @ x.mT).softmax(-1).mean(0), rtol=1e-12)


def test_torchs_caches_on_disk_are_kept_apart():
    plain = torch.compiler.config.cache_key_tag
    with ours.set_batch_invariant_mode():
        assert torch.compiler.config.cache_key_tag != plain
    assert torch.compiler.config.cache_key_tag == plain
