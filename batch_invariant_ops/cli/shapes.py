"""Which GEMMs a model's linear layers are, from its config.json, fused and split as vLLM runs them."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from batch_invariant_ops.cli.errors import BadInput

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VOCABULARY_STEP = 64
QKV_BIAS_TYPES = ("qwen", "qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_text")


@dataclass(frozen=True)
class Layer:
    """One linear layer, y [M, N] = x [M, K]·Wᵀ.

    Attributes:
        name: what the layer is called.
        n, k: output and input features.
        has_bias: whether it has a bias.
        on_samples: whether it runs on the sampled tokens alone, not on all.
    """

    name: str
    n: int
    k: int
    has_bias: bool = False
    on_samples: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags by which a command is told its layers."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, metavar="DIR", help="the layers of the model whose config.json is in DIR")
    what.add_argument("--shapes", nargs="+", metavar="N,K", help="layers with weights [N, K]")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="RANKS", help="split --model's layers")


def of(arguments: argparse.Namespace) -> tuple[list[Layer], torch.dtype]:
    """The layers that were asked for, and the type of their weights: the model's, or bfloat16.

    Raises:
        BadInput: see :func:`of_model` and :func:`of_arguments`.
    """
    if arguments.model is not None:
        return of_model(arguments.model, arguments.tensor_parallel_size)
    return of_arguments(arguments.shapes), torch.bfloat16


def of_model(folder: Path, tensor_parallel_size: int = 1) -> tuple[list[Layer], torch.dtype]:
    """The linear layers of one rank, and the type of the weights.

    Raises:
        BadInput: there is no readable config.json, or it is not one of a Llama-like model.
    """
    config = _config(folder)
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        vocabulary = config["vocab_size"]
        inner = config.get("intermediate_size")
        kv_heads = config.get("num_key_value_heads") or heads
        head_size = config.get("head_dim") or hidden // heads
        numbers = (hidden, heads, vocabulary, kv_heads, head_size)
        if not all(type(x) is int and x > 0 for x in numbers):
            raise ValueError
    except (KeyError, ValueError, TypeError) as error:
        raise BadInput(
            f"--model {folder}: its config.json does not name the sizes of a Llama-like model (hidden_size, "
            "num_attention_heads, vocab_size); give its layers by --shapes N,K"
        ) from error
    ranks = tensor_parallel_size
    for what, size in (("attention heads", heads), ("intermediate features", inner or 0)):
        if size % ranks:
            raise BadInput(f"--tensor-parallel-size {ranks}: {size} {what} are not divisible by it")
    all_bias = bool(config.get("attention_bias"))
    qkv_bias = all_bias or config.get("model_type") in QKV_BIAS_TYPES
    mlp_bias = bool(config.get("mlp_bias"))
    qkv = (heads // ranks + 2 * max(1, kv_heads // ranks)) * head_size
    layers = [Layer("qkv_proj", qkv, hidden, qkv_bias), Layer("o_proj", hidden, heads * head_size // ranks, all_bias)]
    if inner:
        layers += [Layer("gate_up_proj", 2 * inner // ranks, hidden, mlp_bias)]
        layers += [Layer("down_proj", hidden, inner // ranks, mlp_bias)]
    experts = config.get("num_experts") or config.get("num_local_experts")
    if experts:
        layers.append(Layer("router", experts, hidden))
    padded = vocabulary + -vocabulary % VOCABULARY_STEP
    layers.append(Layer("lm_head", padded // ranks, hidden, on_samples=True))
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPES:
        raise BadInput(f"--model {folder}: weights of type {dtype} are not covered: {', '.join(DTYPES)} are")
    return layers, DTYPES[dtype]


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise BadInput(f"--model {folder}: no such folder; a folder with a config.json is needed")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"--model {folder}: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"--model {folder}: its config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise BadInput(f"--model {folder}: its config.json is not an object")
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def of_arguments(given: list[str]) -> list[Layer]:
    """Layers from ``N,K`` pairs.

    Raises:
        BadInput: a pair is no pair of whole numbers above 1.
    """
    layers = []
    for text in given:
        parts = text.split(",")
        if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 1 for part in parts):
            raise BadInput(f"--shapes {text}: N,K with whole numbers above 1 is needed, as in 4096,14336")
        layers.append(Layer("linear", int(parts[0]), int(parts[1])))
    return layers
