"""A real engine's attention is tried in batches of every kind, and attention that goes by its batch is found out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from real_server import ON_GPU, SECONDS, needs_server

from batch_invariant_ops.integrations.attention import (
    ANSWERS,
    END,
    FLASH,
    LENGTH,
    LONG,
    TRITON,
    Request,
    automatic_backend,
    batches,
    fitting,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("longest", [1, 2, 40, 2048, 131072])
@pytest.mark.parametrize("rows, requests", [(1, 1), (64, 1), (512, 6), (8192, 256)])
@pytest.mark.parametrize("window", [None, 64, 4096])
def test_every_batch_is_one_that_the_engine_could_have(longest, rows, requests, window):
    found = batches(longest, rows, requests, window)
    known = {row for (one,) in found["alone"] for row in range(one.start, one.stop)}
    for name, several in found.items():
        for made in several:
            assert all({*range(one.start, one.stop)} <= known for one in made if one.compared), name
            assert sum(one.compared for one in made) == 1, name
            assert len(made) <= requests and sum(one.stop - one.start for one in made) <= rows, name
            assert all(0 <= one.start < one.stop <= longest for one in made), name


def test_the_batches_differ_in_what_kernels_go_by():
    made = batches(131072, 8192, 256, 4096)
    assert [one.stop for (one,) in made["as an answer alone"]] == list(ANSWERS) and ANSWERS[-1] == LENGTH
    everything = [requests for several in made.values() for requests in several]
    longest_query = {max(one.stop - one.start for one in requests) for requests in everything}
    longest_context = {max(one.stop for one in requests) for requests in everything}
    assert {1, 7, 130, LENGTH, END, END // 2} <= longest_query
    assert {*ANSWERS, LONG, 4096 + 65, 131072} <= longest_context
    assert {len(requests) for requests in everything} >= {1, 2, 64}


def test_what_does_not_fit_is_left_out_and_never_what_is_compared():
    one, other, third = Request(0, 30), Request(0, 5, True), Request(0, 4)
    assert fitting([one, other, third], 10, 8) == [other, third]
    assert fitting([third, one, other], 100, 2) == [third, other]


@pytest.mark.parametrize(("room", "last"), [(64, 64), (800, LENGTH), (2048, 2048), (10**6, LONG)])
def test_no_token_has_its_place_beyond_the_kv_cache(room, last):
    made = batches(131072, 8192, 256, None, room)
    compared = [one for several in made.values() for requests in several for one in requests if one.compared]
    assert max(one.stop for one in compared) == last


@pytest.mark.parametrize(
    ("changes", "capability", "backend", "why"),
    [
        ({}, (9, 0), FLASH, ""),
        ({}, (8, 0), FLASH, ""),
        ({}, None, FLASH, ""),
        ({"dtype": torch.float16}, (9, 0), FLASH, ""),
        ({}, (7, 5), TRITON, "needs compute capability 8.0, and this is 7.5"),
        ({"dtype": torch.float32}, (9, 0), TRITON, "does not compute in float32"),
        ({"get_sliding_window": lambda: 2047}, (9, 0), TRITON, "with a sliding window, of 2047 here"),
        ({"get_sliding_window": lambda: 2048}, (9, 0), FLASH, ""),
        ({"get_sliding_window": lambda: 64, "disable_sliding_window": True}, (9, 0), FLASH, ""),
    ],
)
def test_a_model_that_no_backend_was_asked_for_has_the_fastest_that_is_batch_invariant(
    changes, capability, backend, why
):
    plain = {
        "disable_sliding_window": False,
        "get_sliding_window": lambda: None,
        "dtype": torch.bfloat16,
        "max_model_len": 2048,
    }
    chosen, said = automatic_backend(SimpleNamespace(**plain | changes), capability)
    assert chosen == backend and (why in said if why else not said)


TRY = """
import json, sys
sys.path.insert(0, sys.argv[2])
from vllm import LLM
from vllm.v1.attention.backend import CommonAttentionMetadata
from batch_invariant_ops.integrations import attention

llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=int(sys.argv[3]), max_num_batched_tokens=1024, max_num_seqs=32)
runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
config = llm.llm_engine.vllm_config
attend = attention.Sequence.attend

def liar(sequence, builder, requests):
    rows, which = attend(sequence, builder, requests)
    return (rows if len(requests) != 2 else rows * 1.01), which

def seen():
    verdicts = attention.tried(config, runner, CommonAttentionMetadata)
    return [[one.layer, one.tried, list(one.differing)] for one in verdicts]

found = {"honest": seen()}
attention.Sequence.attend = liar
found["liar"] = seen()
attention.Sequence.attend = attend
found["again"] = seen()
answer = llm.generate("the river", use_tqdm=False)[0].outputs[0].token_ids
print("FOUND", json.dumps(found | {"answered": len(answer)}))
"""


def run(model, split, longest=2048):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "BATCH_"))} | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_BATCH_INVARIANT": str(int(ON_GPU and not split)),
        "VLLM_CPU_ATTN_SPLIT_KV": str(int(split)), "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", TRY, model, ROOT, str(longest)],
        env=env,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd="/",
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("FOUND "))


@needs_server
def test_an_engines_attention_has_the_same_bits_in_all_and_a_liar_is_found(small_model):
    found = run(small_model, split=False)
    ((layer, tried, differing),) = found["honest"]
    assert layer == ("FLASH_ATTN with 8 heads of 128 over 4" if ON_GPU else "CPU_ATTN with 8 heads of 64 over 4")
    made = batches(2048, 1024, 32, None)
    assert (tried, differing) == (sum(map(len, made.values())), []) and found["again"] == found["honest"]
    ((_, _, differing),) = found["liar"]
    assert differing == [name for name, several in made.items() if len(several[0]) == 2]
    assert found["answered"] > 0, "the engine serves afterwards"


@needs_server
def test_attention_as_vllm_ships_it_is_found_out(small_model):
    """It splits the keys of a few long requests among the idle cores or multiprocessors."""
    ((_, _, differing),) = run(small_model, split=True)["honest"]
    assert "as an answer alone" in differing


@needs_server
@pytest.mark.skipif(ON_GPU, reason="it is vLLM's kernel for a CPU that goes by the rows of a long prompt's piece")
def test_a_kernel_that_goes_by_the_pieces_of_a_long_prompt_is_found_out(small_model):
    ((_, _, differing),) = run(small_model, split=False, longest=8192)["honest"]
    if not differing:
        pytest.skip("inconclusive: on this CPU vLLM's own way shows no difference")
    assert differing == ["after a long prompt"]


@needs_server
def test_a_server_tries_its_own_before_it_answers(batch_invariant_server):
    log = batch_invariant_server.log.read_text()
    tried, ready = log.find("the same bits in all"), log.find("Application startup complete")
    assert 0 < tried < ready, log[-3000:]
