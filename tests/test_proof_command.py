"""``python -m batch_invariant_ops prove``: what it finds, keeps and prints, and how it takes bad input."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batch_invariant_ops import certificates, cli, proving
from batch_invariant_ops.certificates import Case
from batch_invariant_ops.cli import shapes
from batch_invariant_ops.cli.errors import BadInput
from batch_invariant_ops.cli.progress import Progress, clock
from batch_invariant_ops.ops import vendor_gemm
from batch_invariant_ops.proof import Window

ROOT = Path(__file__).resolve().parents[1]
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN_05B = {
    "model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2,
    "intermediate_size": 4864, "vocab_size": 151936, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCH_INVARIANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def honest(monkeypatch):
    """A vendor that computes row by row."""
    monkeypatch.setattr(vendor_gemm, "call", lambda a, b, bias: torch.stack([row @ b for row in a]))


def model(folder, **changes):
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | changes))
    return folder


def test_as_a_user_runs_it(cache, tmp_path):
    command = ["prove", "--shapes", "64,96", "--exhaustive", "--max-tokens", "20", "--json", str(tmp_path / "a.json")]
    done = subprocess.run(
        [sys.executable, "-m", "batch_invariant_ops", *command],
        cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "linear N=64 K=96 bfloat16: one row's bits at every M from" in done.stdout
    assert "1 of 1 proven in" in done.stdout and f"certificates kept in {cache}" in done.stdout
    (result,) = json.loads((tmp_path / "a.json").read_text())["results"]
    assert result["window"]["cap"] == 20 and result["exhaustive"] is True
    assert certificates.load(Case(64, 96, torch.bfloat16), torch.device("cpu")).window.cap == 20


def test_a_sample_keeps_nothing(cache, honest, capsys):
    assert cli.main(["prove", "--shapes", "8,4", "--device", "cpu", "--max-tokens", "16"]) == 0
    assert "a sample of M from 1 to 16" in capsys.readouterr().out
    assert not cache.exists()


def test_what_disagrees_is_named_and_is_the_exit_status(honest, monkeypatch, capsys):
    right = vendor_gemm.call

    def liar(a, b, bias):
        return right(a, b, bias) + (len(a) in (70, 71, 90))

    monkeypatch.setattr(vendor_gemm, "call", liar)
    assert cli.main(["prove", "--shapes", "8,4", "--device", "cpu", "--exhaustive", "--max-tokens", "100"]) == 1
    text = capsys.readouterr().out
    assert "not proven over every M up to 100: other bits at M = 70-71, 90" in text and "0 of 1 proven" in text


def test_json_on_standard_output_is_all_that_is_there(honest, capsys):
    assert cli.main(["prove", "--shapes", "8,4", "9,4", "--dtype", "float32", "--max-tokens", "4", "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [(r["n"], r["k"], r["dtype"]) for r in content["results"]] == [(8, 4, "float32"), (9, 4, "float32")]
    assert content["machine"]["torch"] == torch.__version__


class TestShapes:
    def test_of_a_llama(self, tmp_path):
        layers, dtype = shapes.of_model(model(tmp_path))
        assert dtype == torch.bfloat16
        assert [(layer.name, layer.n, layer.k) for layer in layers] == [
            ("qkv_proj", 6144, 4096), ("o_proj", 4096, 4096), ("gate_up_proj", 28672, 4096),
            ("down_proj", 4096, 14336), ("lm_head", 128256, 4096),
        ]  # fmt: skip
        assert not any(layer.has_bias for layer in layers)
        assert [layer.name for layer in layers if layer.on_samples] == ["lm_head"]

    def test_qwen2_has_a_bias_in_qkv(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(QWEN_05B))
        layers, _ = shapes.of_model(tmp_path)
        assert [(layer.n, layer.k, layer.has_bias) for layer in layers] == [
            (1152, 896, True), (896, 896, False), (9728, 896, False), (896, 4864, False), (151936, 896, False),
        ]  # fmt: skip

    def test_of_one_rank_of_many(self, tmp_path):
        found = model(tmp_path, hidden_size=8192, num_attention_heads=64, intermediate_size=28672)
        layers, _ = shapes.of_model(found, tensor_parallel_size=8)
        assert [(layer.n, layer.k) for layer in layers] == [
            (1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584), (16032, 8192),
        ]  # fmt: skip

    def test_a_vocabulary_is_padded_as_vllm_pads_it(self, tmp_path):
        assert shapes.of_model(model(tmp_path, vocab_size=50257))[0][-1].n == 50304

    def test_a_models_text_part_counts(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "vision", "text_config": LLAMA_8B}))
        assert shapes.of_model(tmp_path)[0][0].n == 6144

    def test_experts_have_a_router(self, tmp_path):
        layers, _ = shapes.of_model(model(tmp_path, num_local_experts=60))
        assert ("router", 60, 4096) in [(layer.name, layer.n, layer.k) for layer in layers]

    def test_lm_head_is_proven_for_as_many_rows_as_are_sampled(self, tmp_path, monkeypatch):
        seen = {}
        monkeypatch.setattr(proving, "exhaustively", lambda case, device, largest, told: seen.update({case.n: largest})
                            or certificates.Certificate(largest, (), Window(1, largest, largest), 0.0))  # fmt: skip
        arguments = ["prove", "--model", str(model(tmp_path)), "--exhaustive", "--max-tokens", "8192"]
        assert cli.main([*arguments, "--max-seqs", "256"]) == 0
        assert seen == {6144: 8192, 4096: 8192, 28672: 8192, 128256: 256}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--shapes", "5,x"], "--shapes 5,x: N,K with whole numbers above 1 is needed"),
        (["--shapes", "5"], "--shapes 5: N,K"),
        (["--shapes", "0,5"], "--shapes 0,5: N,K"),
        (["--shapes", "5,-3"], "--shapes 5,-3: N,K"),
        (["--shapes", "8,4", "--max-tokens", "0"], "--max-tokens 0: a whole number above 0 is needed"),
        (["--shapes", "8,4", "--max-seqs", "-1"], "--max-seqs -1: a whole number above 0 is needed"),
        (["--shapes", "8,4", "--json", "/nowhere/a.json"], "--json /nowhere/a.json: No such file or directory"),
        (["--model", "/nowhere"], "--model /nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_two(arguments, said, capsys):
    assert cli.main(["prove", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m batch_invariant_ops prove: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "it has no config.json"),
        ("{", "its config.json cannot be read"),
        ("[]", "its config.json is not an object"),
        ("{}", "does not name the sizes of a Llama-like model"),
        (json.dumps(LLAMA_8B | {"hidden_size": "big"}), "does not name the sizes of a Llama-like model"),
        (json.dumps(LLAMA_8B | {"torch_dtype": "float8"}), "weights of type float8 are not covered"),
    ],
)
def test_a_model_without_a_good_configuration(content, said, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert cli.main(["prove", "--model", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_ranks_must_divide_the_heads(tmp_path):
    with pytest.raises(BadInput, match="--tensor-parallel-size 3: 32 attention heads are not divisible by it"):
        shapes.of_model(model(tmp_path), tensor_parallel_size=3)


def test_a_folder_for_certificates_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BATCH_INVARIANT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(proving, "exhaustively", lambda *args: pytest.fail("the work was begun"))
    assert cli.main(["prove", "--shapes", "8,4", "--exhaustive"]) == 2
    assert "certificates cannot be kept there" in capsys.readouterr().err


def test_a_gpu_that_is_not_there(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert cli.main(["prove", "--shapes", "8,4", "--device", "cuda"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_ctrl_c_ends_it_quietly(monkeypatch, capsys):
    monkeypatch.setattr(proving, "compare", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["prove", "--shapes", "8,4", "--device", "cpu"]) == 130
    assert capsys.readouterr().err.endswith("stopped\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestProgress:
    def test_a_terminal_shows_one_line_that_is_written_over(self):
        stream = Terminal()
        progress = Progress([1.0, 3.0], stream)
        progress.last -= 60
        progress.start -= 60
        progress.update(1, "lm_head", 50, 100)
        progress.clear()
        text = stream.getvalue()
        assert "\n" not in text and text.endswith("\r")
        assert "[2/2] lm_head: 50 of 100 (62% of all, 1:00, 0:36 left)" in text

    def test_a_log_gets_a_line_now_and_then(self):
        stream = io.StringIO()
        progress = Progress([1.0], stream)
        for done in range(100):
            progress.update(0, "linear", done, 100)
        assert stream.getvalue() == ""
        progress.last -= 60
        progress.update(0, "linear", 99, 100)
        assert stream.getvalue().startswith("[1/1] linear: 99 of 100") and stream.getvalue().count("\n") == 1

    def test_clock(self):
        assert [clock(s) for s in (0, 65, 3600)] == ["0:00", "1:05", "60:00"]
