"""Thinking Machines' package has these names, arguments and results; code written for it runs on ours."""

import inspect

import pytest
import torch

import batch_invariant_ops
from batch_invariant_ops import (
    AttentionBlockSize,
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    get_batch_invariant_attention_block_size,
    is_batch_invariant_mode_enabled,
    log_softmax,
    matmul_persistent,
    mean_dim,
    set_batch_invariant_mode,
)

ARGUMENTS = {
    "set_batch_invariant_mode": ["enabled"],
    "enable_batch_invariant_mode": [],
    "disable_batch_invariant_mode": [],
    "is_batch_invariant_mode_enabled": [],
    "matmul_persistent": ["a", "b", "bias"],
    "log_softmax": ["input", "dim"],
    "mean_dim": ["input", "dim", "keepdim", "dtype"],
    "get_batch_invariant_attention_block_size": [],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_each_function_takes_their_arguments_in_their_order(name):
    parameters = inspect.signature(getattr(batch_invariant_ops, name)).parameters.values()
    theirs = ARGUMENTS[name]
    assert [p.name for p in parameters][: len(theirs)] == theirs
    assert all(p.default is not p.empty for p in list(parameters)[len(theirs) :])


def test_the_block_size_is_a_named_tuple_of_theirs():
    size = get_batch_invariant_attention_block_size()
    assert size == AttentionBlockSize(block_m=16, block_n=16) == (16, 16)
    assert (size.block_m, size.block_n) == (16, 16)


def first_row_of_a_ramp_alone_and_in_the_batch(dtype, b=256, d=512):
    """The check that their README and their test make."""
    x = torch.linspace(-100, 100, b * d, dtype=dtype).reshape(b, d)
    w = torch.linspace(-100, 100, d * d, dtype=dtype).reshape(d, d)
    return (torch.mm(x[:1], w) - torch.mm(x, w)[:1]).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_their_check_finds_no_difference_in_the_mode(dtype):
    with set_batch_invariant_mode(True):
        assert [first_row_of_a_ramp_alone_and_in_the_batch(dtype) for _ in range(3)] == [0, 0, 0]


def test_their_check_finds_one_without_the_mode():
    with set_batch_invariant_mode(False):
        assert first_row_of_a_ramp_alone_and_in_the_batch(torch.float32) != 0


def test_their_calls_by_name_and_by_place():
    x, w, bias = torch.randn(5, 12), torch.randn(12, 7), torch.randn(7)
    assert torch.allclose(matmul_persistent(x, w, bias=bias), x @ w + bias, atol=1e-5)
    assert torch.allclose(matmul_persistent(a=x, b=w), x @ w, atol=1e-5)
    assert torch.allclose(log_softmax(x, dim=-1), x.log_softmax(-1), atol=1e-6)
    assert torch.allclose(log_softmax(x.view(5, 3, 4)), x.view(5, 3, 4).log_softmax(-1), atol=1e-6)
    assert torch.allclose(mean_dim(x, 0, True), x.mean(0, keepdim=True), atol=1e-6)
    assert mean_dim(x, dim=1, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert mean_dim(torch.arange(6).view(2, 3), 1).dtype == torch.float32


def test_enabling_and_disabling_by_hand():
    enable_batch_invariant_mode()
    try:
        assert is_batch_invariant_mode_enabled()
        assert first_row_of_a_ramp_alone_and_in_the_batch(torch.float32) == 0
    finally:
        disable_batch_invariant_mode()
    assert not is_batch_invariant_mode_enabled()
