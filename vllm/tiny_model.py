#!/usr/bin/env python3
"""Make a small random Llama with its own tokenizer, so that a server can be tried without a download.

    python vllm/tiny_model.py .demo/model
    python vllm/tiny_model.py /tmp/llama --preset llama-8b-8layers

The weights are drawn from N(0, s). The scales are such that attention and logits are not flat: a change in a last bit
then shows in the logprobs, so that plain vLLM fails a determinism test on this model. The same seed, preset and kind of
device (CPU or GPU) give the same bytes. Needs torch, safetensors and tokenizers.
"""

import argparse
import itertools
import json
import string
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

BOS, EOS = "<s>", "</s>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Preset:
    """A model's shape and the scale of its weights; sizes are in elements."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    positions: int
    rope_theta: float
    linear_scale: float
    query_key_scale: float
    head_scale: float
    embedding_scale: float = 1.0


PRESETS = {
    "tiny": Preset(512, 1408, 4, 8, 4, 4096, 2048, 10000.0, 0.04, 0.08, 0.1),
    "tiny-wide-heads": Preset(1024, 2816, 4, 8, 4, 4096, 2048, 10000.0, 0.03, 0.055, 0.07),
    "llama-8b-8layers": Preset(4096, 14336, 8, 32, 8, 128256, 131072, 500000.0, 0.02, 0.03, 0.04),
}


def config(preset: Preset, layers: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "transformers_version": "5.0.0",
        "vocab_size": preset.vocab,
        "hidden_size": preset.hidden,
        "intermediate_size": preset.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": preset.heads,
        "num_key_value_heads": preset.kv_heads,
        "head_dim": preset.hidden // preset.heads,
        "max_position_embeddings": preset.positions,
        "rope_theta": preset.rope_theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def vocabulary(size: int) -> list[str]:
    """Begin, end, one token a byte, then words with a space before them, so that every id decodes to readable text."""
    letters = string.ascii_lowercase
    words = ("Ġ" + "".join(word) for length in itertools.count(2) for word in itertools.product(letters, repeat=length))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [BOS, EOS, *alphabet, *itertools.islice(words, size - 2 - len(alphabet))]


def tokenizer(size: int) -> Tokenizer:
    """A byte-level tokenizer of `size` tokens without merges: text becomes one token a byte, after one BOS."""
    tokens = vocabulary(size)
    made = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    made.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return made


def shards(preset: Preset, layers: int) -> Iterator[dict[str, tuple[tuple[int, ...], float]]]:
    """One file's tensors at a time: name -> (shape, scale); a scale of 0 is a norm, whose weights are all ones."""
    hidden, kv = preset.hidden, preset.hidden // preset.heads * preset.kv_heads
    linear, query_key = preset.linear_scale, preset.query_key_scale
    yield {"model.embed_tokens.weight": ((preset.vocab, hidden), preset.embedding_scale)}
    for layer in range(layers):
        tensors = {
            "self_attn.q_proj": ((hidden, hidden), query_key),
            "self_attn.k_proj": ((kv, hidden), query_key),
            "self_attn.v_proj": ((kv, hidden), linear),
            "self_attn.o_proj": ((hidden, hidden), linear),
            "mlp.gate_proj": ((preset.intermediate, hidden), linear),
            "mlp.up_proj": ((preset.intermediate, hidden), linear),
            "mlp.down_proj": ((hidden, preset.intermediate), linear),
            "input_layernorm": ((hidden,), 0.0),
            "post_attention_layernorm": ((hidden,), 0.0),
        }
        yield {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in tensors.items()}
    yield {"model.norm.weight": ((hidden,), 0.0), "lm_head.weight": ((preset.vocab, hidden), preset.head_scale)}


def draw(name: str, shape: tuple[int, ...], scale: float, seed: int, device: str) -> torch.Tensor:
    """One weight in bf16, from a generator of its own: it does not change with the layers around it.

    The generator's seed has 32 bits, as a CPU's generator reads no more.
    """
    if not scale:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return weight.normal_(0, scale, generator=generator).cpu()


def write_weights(folder: Path, preset: Preset, layers: int, seed: int, device: str) -> int:
    """Write the weights shard by shard with their index; returns the number of parameters."""
    files = list(shards(preset, layers))
    index: dict[str, str] = {}
    parameters = 0
    for number, tensors in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weights = {name: draw(name, shape, scale, seed, device) for name, (shape, scale) in tensors.items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes it 0600, which another user's container cannot read
        index |= dict.fromkeys(weights, file)
        parameters += sum(weight.numel() for weight in weights.values())
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": parameters * 2}, "weight_map": index}
    )
    return parameters


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make(folder: Path, preset: Preset, layers: int, seed: int) -> int:
    """Make the model in `folder`; returns the number of parameters. config.json, last, says it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [folder / "config.json", *folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        old.unlink(missing_ok=True)
    # A GPU draws other numbers than a CPU: the tiny model is the same everywhere, the big one is made where it is fast.
    device = "cuda" if torch.cuda.is_available() and preset is not PRESETS["tiny"] else "cpu"
    parameters = write_weights(folder, preset, layers, seed, device)
    tokenizer(preset.vocab).save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "model_max_length": preset.positions,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    write_json(folder / "config.json", config(preset, layers))
    return parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write; an older model in it is replaced")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="default: %(default)s")
    parser.add_argument("--layers", type=int, help="number of layers; default: the preset's")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    layers = preset.layers if arguments.layers is None else arguments.layers
    if layers < 1:
        parser.error(f"--layers={layers} is not valid: at least 1 is needed")
    if not 0 <= arguments.seed < 2**31:
        parser.error(f"--seed={arguments.seed} is not valid: 0 to 2147483647 is needed")
    try:
        parameters = make(arguments.out, preset, layers, arguments.seed)
    except OSError as error:
        print(f"tiny_model: {arguments.out} cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{arguments.out}: {parameters / 1e6:.1f} M parameters, {layers} layers, bf16")


if __name__ == "__main__":
    main()
