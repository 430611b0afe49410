"""What a vLLM configuration asks for that nobody has proven to be batch invariant: refused, unless the user insists."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

SWITCH = "BATCH_INVARIANT_ALLOW_UNPROVEN"
PROVEN_CACHE_TYPES = ("auto", "bfloat16", "float16")

# Each gives what it found, in the words of vLLM's own settings, or nothing.
_QUESTIONS: tuple[Callable[[Any], str | None], ...] = (
    lambda config: _when(config.model_config.quantization, "quantization={}"),
    lambda config: _when(config.cache_config.cache_dtype not in PROVEN_CACHE_TYPES, "a quantized KV cache"),
    lambda config: _when(_experts(config.model_config) > 1, "a mixture of experts"),
    lambda config: _when(config.model_config.is_multimodal_model, "a multimodal model"),
    lambda config: _when(config.model_config.is_encoder_decoder, "an encoder-decoder model"),
    lambda config: _when(config.model_config.is_hybrid or config.model_config.is_attention_free, "state-space layers"),
    lambda config: _when(config.lora_config, "LoRA"),
    lambda config: _when(config.speculative_config, "speculative decoding"),
    lambda config: _when_above_one(config.parallel_config.tensor_parallel_size, "tensor_parallel_size={}"),
    lambda config: _when_above_one(config.parallel_config.pipeline_parallel_size, "pipeline_parallel_size={}"),
    lambda config: _when_above_one(config.parallel_config.data_parallel_size, "data_parallel_size={}"),
)


WAY_OUT = "VLLM_ATTENTION_BACKEND=TRITON_ATTN may do without it"
FLASH_ATTENTION = "FLASH_ATTN"
PROVEN_HEADS = (96, 128, 256)
"""Sizes at which FlashAttention 3 was seen to keep a request's bits (docs/evidence/serving-h200)."""


def attention_layers(model: Any) -> Iterator[tuple[Any, str]]:
    """A loaded model's attention layers, each with its backend's name."""
    for module in model.modules():
        if hasattr(module, "get_attn_backend"):
            yield module, module.get_attn_backend().get_name()


def attention(model: Any) -> list[str]:
    """What of a loaded model's attention layers is not proven where it could not be tried, as :func:`unproven` says it.

    FlashAttention 3 picks the length of its steps along the keys by the longest query, and with a window by the longest
    context, of the whole batch. At a head size of 64 a request then has other bits beside a prompt than beside answers.
    """
    found = set()
    for layer, backend in attention_layers(model):
        if backend != FLASH_ATTENTION:
            continue
        if layer.head_size not in PROVEN_HEADS:
            found.add(f"FlashAttention with heads of {layer.head_size}")
        if getattr(layer, "sliding_window", None) is not None:
            found.add("FlashAttention with a sliding window")
    return [f"{what} ({WAY_OUT})" for what in sorted(found)]


def unproven(config: Any) -> list[str]:
    """What of a ``VllmConfig`` is not proven, in the order of the table above; empty where all of it is."""
    return [found for question in _QUESTIONS if (found := question(config)) is not None]


def allowed() -> bool:
    """Whether the user asked to serve what is not proven."""
    return os.environ.get(SWITCH) == "1"


def _experts(model_config: Any) -> int:
    return int(model_config.get_num_experts() or 0)


def _when(value: Any, words: str) -> str | None:
    return words.format(value) if value else None


def _when_above_one(value: int, words: str) -> str | None:
    return words.format(value) if value > 1 else None
