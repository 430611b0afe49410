"""transformers' Llama, each of its operations as transformers computes it or as vLLM's CPU server does.

The server compiles its layers with torch.compile, whose CPU kernels work in fp32 and round to bf16 only what they
store. Eager transformers rounds after every operation. So most of the forms below are the same formula with fewer
roundings; the sum in RMSNorm and attention have an order of addition as well.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from transformers.utils import logging

from batch_invariant_ops import rms_norm, set_batch_invariant_mode

PRODUCTS = "matrix products"
RESIDUAL = "residual and RMSNorm"
ROTARY = "rotary embedding"
ACTIVATION = "SiLU and product"
ATTENTION = "attention"
LOG_SOFTMAX = "log_softmax"
NORM_ORDER = "RMSNorm's order"
FORMS = {
    PRODUCTS: ("torch's own", "our mode's, which keep the contract of the server's layers"),
    RESIDUAL: ("bf16, transformers' norm", "fp32 through all layers, our rms_norm"),
    ROTARY: ("bf16 after each step", "fp32 inside, one rounding"),
    ACTIVATION: ("bf16 after each step", "fp32 inside, one rounding"),
    ATTENTION: ("torch's", "vLLM's CPU kernel, the KV not split"),
    LOG_SOFTMAX: ("our mode's", "torch's own, which a server on a CPU keeps"),
    NORM_ORDER: ("our rms_norm's", "that of torch.compile's kernels"),
}
"""Each operation without and with the server's form; RMSNorm's order needs the fp32 residual."""
FP32_LANES = {"AVX512": 16, "AVX2": 8}
BLOCK = 128  # tokens in one block of the KV cache: vLLM's own for a CPU
Ids = Sequence[int]
Norm = Callable[[torch.Tensor, torch.Tensor, float, int], torch.Tensor]


def load(folder: Path) -> Any:
    """The causal language model in a folder, in its own dtype, for inference on the CPU."""
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def logprobs(model: Any, answers: Sequence[tuple[Ids, Ids]], forms: Collection[str]) -> list[float]:
    """log p(token | all before it) in nats for the tokens of all answers, each in one forward pass over its sequence.

    Args:
        model: as `load` gives it.
        answers: (prompt, tokens), both ids.
        forms: the operations, of FORMS, that are computed as the server does.
    """
    with served(model, forms):
        logits = [
            model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            for prompt, tokens in answers
        ]
    with set_batch_invariant_mode(PRODUCTS in forms and LOG_SOFTMAX not in forms):
        rows = [one.log_softmax(dim=-1, dtype=torch.float32) for one in logits]
    return [
        row[token].item()
        for (_, ids), all_rows in zip(answers, rows, strict=True)
        for token, row in zip(ids, all_rows, strict=True)
    ]


@contextlib.contextmanager
def served(model: Any, forms: Collection[str]) -> Iterator[None]:
    """Compute the named operations of transformers' Llama as the server does, for a block."""
    parts: list[Any] = [set_batch_invariant_mode(PRODUCTS in forms)]
    if RESIDUAL in forms:
        norm = served_norm if NORM_ORDER in forms else our_norm
        last_norm = last_norm_with(norm, 2 * model.config.num_hidden_layers)
        parts.append(mock.patch.object(modeling_llama.LlamaDecoderLayer, "forward", layer_with(norm)))
        parts.append(mock.patch.object(modeling_llama.LlamaRMSNorm, "forward", last_norm))
    if ROTARY in forms:
        parts.append(mock.patch.object(modeling_llama, "apply_rotary_pos_emb", rotary))
    if ACTIVATION in forms:
        parts.append(mock.patch.object(modeling_llama.LlamaMLP, "forward", mlp))
    if ATTENTION in forms:
        parts.append(attention_of(model))
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(part)
        yield


@contextlib.contextmanager
def attention_of(model: Any) -> Iterator[None]:
    """Give the model `attention`, for a block."""
    before = model.config._attn_implementation
    AttentionInterface.register("vllm_cpu", attention)
    model.config._attn_implementation = "vllm_cpu"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def our_norm(total: torch.Tensor, weight: torch.Tensor, eps: float, _number: int) -> torch.Tensor:
    """RMSNorm of fp32 rows [..., hidden] by our rms_norm, in the weight's type."""
    return cast(torch.Tensor, rms_norm(total, weight, eps)).to(weight.dtype)


def served_norm(total: torch.Tensor, weight: torch.Tensor, eps: float, number: int) -> torch.Tensor:
    """`our_norm` with the sum of squares as torch.compile's kernels add it, and one rounding.

    In each lane of the CPU's vectors the squares are added in turn, then halves of the lanes until one is left. The
    kernel holds two vectors; the model's norms 3, 7, 11 and so on, counted from 0, hold one, as they also write the
    residual down, which inductor does once it is a sum of four.
    """
    lanes = FP32_LANES.get(torch.backends.cpu.get_cpu_capability(), 4) * (1 if number % 4 == 3 else 2)
    first, *others = (total * total).unflatten(-1, (-1, lanes)).unbind(-2)
    sums = sum(others, first)
    while sums.shape[-1] > 1:
        low, high = sums.chunk(2, dim=-1)
        sums = low + high
    return (total * torch.rsqrt(sums / total.shape[-1] + eps) * weight.float()).to(weight.dtype)


def layer_with(norm: Norm) -> Callable[..., torch.Tensor]:
    """A decoder layer whose residual, its result, is fp32; the first layer's input are the embeddings."""

    def forward(self: Any, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        total, number = hidden_states.float(), 2 * self.self_attn.layer_idx
        first, second = self.input_layernorm, self.post_attention_layernorm
        x = norm(total, first.weight, first.variance_epsilon, number)
        total = total + self.self_attn(hidden_states=x, **others)[0].float()
        x = norm(total, second.weight, second.variance_epsilon, number + 1)
        return total + self.mlp(x).float()

    return forward


def last_norm_with(norm: Norm, number: int) -> Callable[..., torch.Tensor]:
    """The norm after the last layer; the layers above call `norm` themselves."""
    return lambda self, total: norm(total, self.weight, self.variance_epsilon, number)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k [1, heads, num_tokens, head_dim] turned by the angles of cos and sin [1, num_tokens, head_dim]."""
    cos, sin = cos.unsqueeze(unsqueeze_dim).float(), sin.unsqueeze(unsqueeze_dim).float()

    def turned(x: torch.Tensor) -> torch.Tensor:
        return (x.float() * cos + modeling_llama.rotate_half(x.float()) * sin).to(x.dtype)

    return turned(q), turned(k)


def mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) for x [..., hidden]."""
    gate, up = self.gate_proj(x), self.up_proj(x)
    return self.down_proj((torch.nn.functional.silu(gate.float()) * up.float()).to(x.dtype))


def attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention by the server's kernel, over a KV cache that holds this one sequence.

    Args:
        query: [1, num_heads, num_tokens, head_dim].
        key, value: [1, num_kv_heads, num_tokens, head_dim].

    Returns:
        [1, num_tokens, num_heads, head_dim], and None where transformers' eager form has the weights.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from vllm import _custom_ops

    current_platform.import_kernels()
    q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    blocks = -(-num_tokens // BLOCK)
    instruction_set = _get_attn_isa(q.dtype, BLOCK, head_dim)
    cache = torch.zeros(blocks, num_kv_heads, 2 * BLOCK, head_dim, dtype=q.dtype).chunk(2, dim=2)
    starts = torch.tensor([0, num_tokens], dtype=torch.int32)
    lengths = starts[1:]
    _custom_ops.cpu_attn_reshape_and_cache(k, v, cache[0], cache[1], torch.arange(num_tokens), instruction_set)
    schedule = _custom_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        seq_lens=lengths,
        dtype=q.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=instruction_set,
        enable_kv_split=False,
    )
    out = torch.empty_like(q)
    _custom_ops.cpu_attention_with_kv_cache(
        query=q,
        key_cache=cache[0],
        value_cache=cache[1],
        output=out,
        query_start_loc=starts,
        seq_lens=lengths,
        scale=scaling,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=torch.arange(blocks, dtype=torch.int32)[None],
        softcap=0.0,
        scheduler_metadata=schedule,
        s_aux=None,
    )
    return out[None], None
