"""What nobody has proven is refused before a model is loaded, by the names that vLLM's own configuration has."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from real_server import needs_vllm

from batch_invariant_ops import status
from batch_invariant_ops.integrations import attention as attention_check
from batch_invariant_ops.integrations import unproven
from batch_invariant_ops.integrations import vllm as integration
from batch_invariant_ops.integrations.attention import Verdict

ROOT = Path(__file__).resolve().parents[2]

PLAIN = {
    "model_config": {
        "quantization": None,
        "is_multimodal_model": False,
        "is_encoder_decoder": False,
        "is_hybrid": False,
        "is_attention_free": False,
        "get_num_experts": lambda: 0,
    },
    "cache_config": {"cache_dtype": "auto"},
    "lora_config": None,
    "speculative_config": None,
    "parallel_config": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1},
}


def config(**changes):
    """A plain configuration with some values replaced, named `part__name` or `part`."""
    made = {part: dict(value) if isinstance(value, dict) else value for part, value in PLAIN.items()}
    for path, value in changes.items():
        part, _, name = path.partition("__")
        if name:
            made[part][name] = value
        else:
            made[part] = value
    return SimpleNamespace(**{p: SimpleNamespace(**v) if isinstance(v, dict) else v for p, v in made.items()})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_config__quantization": "fp8"}, "quantization=fp8"),
        ({"cache_config__cache_dtype": "fp8_e4m3"}, "a quantized KV cache"),
        ({"model_config__get_num_experts": lambda: 8}, "a mixture of experts"),
        ({"model_config__is_multimodal_model": True}, "a multimodal model"),
        ({"model_config__is_encoder_decoder": True}, "an encoder-decoder model"),
        ({"model_config__is_hybrid": True}, "state-space layers"),
        ({"lora_config": object()}, "LoRA"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"parallel_config__tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"parallel_config__data_parallel_size": 4}, "data_parallel_size=4"),
    ],
)
def test_what_is_not_proven_is_named_and_stops_the_process(change, words, monkeypatch, capsys):
    monkeypatch.delenv(unproven.SWITCH, raising=False)
    with pytest.raises(SystemExit) as stopped:
        integration._refuse_unproven(config(**change))
    assert stopped.value.code == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert f"not proven to be batch invariant: {words}; {unproven.SWITCH}=1" in line


def test_a_plain_model_is_served(monkeypatch):
    monkeypatch.delenv(unproven.SWITCH, raising=False)
    integration._refuse_unproven(config())


def test_the_switch_lets_it_serve_and_says_so_in_the_log(monkeypatch, caplog):
    monkeypatch.setenv(unproven.SWITCH, "1")
    monkeypatch.setattr(integration.logger, "propagate", True)
    integration._refuse_unproven(config(lora_config=object(), model_config__quantization="awq"))
    assert "serving what is not proven to be batch invariant: quantization=awq, LoRA" in caplog.text


class Layer:
    """An attention layer as vLLM has them."""

    def __init__(self, head_size=128, sliding_window=None, backend="FLASH_ATTN"):
        self.head_size, self.sliding_window = head_size, sliding_window
        self.get_attn_backend = lambda: SimpleNamespace(get_name=lambda: backend)


def attention(*layers):
    return unproven.attention(SimpleNamespace(modules=lambda: [object(), *layers]))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Layer(64), "FlashAttention with heads of 64"),
        (Layer(80), "FlashAttention with heads of 80"),
        (Layer(256, 4096), "FlashAttention with a sliding window"),
    ],
)
def test_attention_that_goes_by_its_batch_is_named_once_with_a_way_out(layer, words):
    assert attention(Layer(), layer, layer) == [f"{words} ({unproven.WAY_OUT})"]


def test_attention_that_does_not_is_not():
    layers = [Layer(size) for size in unproven.PROVEN_HEADS]
    assert attention(*layers, Layer(64, 512, "TRITON_ATTN"), Layer(64, None, "CPU_ATTN")) == []


CUDA = SimpleNamespace(type="cuda")


class Runner:
    """A worker's runner, whose attention cannot be tried: it has none of the engine's parts."""

    def get_model(self):
        return SimpleNamespace(modules=lambda: [Layer(64)])


@needs_vllm
def test_attention_that_cannot_be_tried_goes_by_what_is_known(monkeypatch, capsys):
    monkeypatch.delenv(unproven.SWITCH, raising=False)
    with pytest.raises(SystemExit) as stopped:
        integration._try_attention(config(), CUDA, Runner())
    assert stopped.value.code == 70 and "heads of 64" in capsys.readouterr().err
    integration._try_attention(config(), SimpleNamespace(type="cpu"), Runner())


@pytest.fixture
def seen(monkeypatch):
    """Attention that was tried, and had other bits in one batch."""
    verdicts = [Verdict("A with heads of 64", 9, (), 0.1), Verdict("B", 9, ("as an answer alone", "and another"), 0.1)]
    monkeypatch.setattr(attention_check, "tried", lambda *engine: iter(verdicts))


@needs_vllm
def test_attention_seen_to_go_by_its_batch_stops_a_server_before_it_answers(seen, monkeypatch, capsys):
    monkeypatch.delenv(unproven.SWITCH, raising=False)
    with pytest.raises(SystemExit) as stopped:
        integration._try_attention(config(), CUDA, Runner())
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 70
    assert f"not proven to be batch invariant: B, which has other bits as an answer alone ({unproven.WAY_OUT})" in line


@needs_vllm
def test_served_all_the_same_its_fingerprint_says_so(seen, monkeypatch, tmp_path):
    monkeypatch.setenv(unproven.SWITCH, "1")
    monkeypatch.setenv(status.VARIABLE, str(tmp_path / "status.json"))
    for before in (None, "LoRA"):
        status.write({"ok": True, "numerics": {"threads": 2, "unproven": before}})
        integration._try_attention(config(), CUDA, Runner())
        numerics = status.read()["numerics"]
        assert numerics["threads"] == 2 and status.read()["ok"] is True
        assert numerics["unproven"].startswith("LoRA, B, which" if before else "B, which has other bits")


class Sampler:
    """The parts of vLLM's sampler module that cut to the likeliest tokens, as 0.26 has them."""

    HAS_TRITON = True

    def __init__(self):
        self.ran = []

    def apply_top_k_top_p(self, logits, k, p):
        self.ran.append("by the number of rows")

    def apply_top_k_top_p_triton(self, logits, k, p):
        self.ran.append("a row")


@pytest.mark.parametrize(
    ("is_cuda", "k", "has_triton", "ran"),
    [
        (True, 5, True, "a row"),
        (True, None, True, "by the number of rows"),
        (True, 5, False, "by the number of rows"),
        (False, 5, True, "by the number of rows"),
    ],
)
def test_one_kernel_cuts_to_the_likeliest_tokens_whatever_the_number_of_rows(is_cuda, k, has_triton, ran):
    sampler = Sampler()
    sampler.HAS_TRITON = has_triton
    integration._patch_sampler(sampler)
    sampler.apply_top_k_top_p(SimpleNamespace(is_cuda=is_cuda), k, None)
    assert sampler.ran == [ran]


REAL = """
import json, sys
from batch_invariant_ops.integrations.unproven import unproven
from vllm.engine.arg_utils import EngineArgs
for changes in ({}, {"enable_lora": True}, {"pipeline_parallel_size": 2}, {"kv_cache_dtype": "fp8_e5m2"}):
    config = EngineArgs(model=sys.argv[1], distributed_executor_backend="mp", **changes).create_engine_config()
    print("found", json.dumps(unproven(config)))
"""


@needs_vllm
def test_vllms_own_configuration_has_these_names(tmp_path):
    model = tmp_path / "model"
    subprocess.run([sys.executable, ROOT / "vllm" / "tiny_model.py", model, "--layers", "1"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", REAL, model],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    found = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("found ")]
    assert found == [[], ["LoRA"], ["pipeline_parallel_size=2"], ["a quantized KV cache"]], done.stderr[-3000:]
