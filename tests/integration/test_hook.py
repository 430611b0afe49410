"""The hook reaches every process, costs nothing elsewhere, hides no other sitecustomize, and fails closed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from real_server import needs_vllm

ROOT = Path(__file__).resolve().parents[2]
HOOK_FOLDER = ROOT / "vllm"


def python(code, path=(), **env):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "BATCH_"))} | env
    env["PYTHONPATH"] = os.pathsep.join(map(str, [*path, HOOK_FOLDER]))
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, cwd="/")


def test_an_ordinary_process_imports_neither_torch_nor_vllm_nor_the_library():
    done = python(
        "import sys; print('hooked', any(getattr(f, '__name__', '') == 'BatchInvariantHook' for f in sys.meta_path));"
        "print([name for name in ('torch', 'vllm', 'batch_invariant_ops', 'numpy') if name in sys.modules])",
        BATCH_INVARIANT="1",
    )
    assert done.stdout.splitlines() == ["hooked True", "[]"], done.stderr


def test_without_the_switch_there_is_no_hook():
    done = python("import sys; print(any('BatchInvariant' in str(finder) for finder in sys.meta_path))")
    assert done.stdout == "False\n", done.stderr


def test_the_sitecustomize_that_ours_hides_still_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('the other one ran')")
    env = {"PYTHONPATH": os.pathsep.join([str(HOOK_FOLDER), str(tmp_path)]), "BATCH_INVARIANT": "1"}
    done = subprocess.run([sys.executable, "-c", "pass"], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "the other one ran\n", done.stderr


SHOW = """
import vllm.model_executor.determinism.batch_invariant as seam
def show(where):
    print(where, seam.linear_batch_invariant.__module__, seam.init_batch_invariance.__module__, flush=True)
"""
OURS = "batch_invariant_ops.integrations.vllm"


@needs_vllm
def test_forked_and_spawned_processes_get_our_kernels(tmp_path):
    code = (
        SHOW
        + """
import multiprocessing
if __name__ == '__main__':
    show('parent')
    for method in ('fork', 'spawn'):
        process = multiprocessing.get_context(method).Process(target=show, args=(method,))
        process.start(); process.join()
        assert process.exitcode == 0
"""
    )
    (tmp_path / "program.py").write_text(code)
    env = dict(os.environ, PYTHONPATH=str(HOOK_FOLDER), BATCH_INVARIANT="1")
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], env=env, capture_output=True, text=True, timeout=300, cwd="/"
    )
    lines = [line for line in done.stdout.splitlines() if OURS in line]
    assert [line.split() for line in lines] == [[where, OURS, OURS] for where in ("parent", "fork", "spawn")], (
        done.stderr
    )


@needs_vllm
def test_without_the_switch_vllm_is_untouched():
    done = python(SHOW + "show('plain')")
    assert done.stdout.splitlines()[-1].split()[1].startswith("vllm."), done.stdout + done.stderr


@needs_vllm
def test_the_plugin_replaces_what_vllm_already_copied():
    done = python(
        "import vllm.model_executor.layers.layernorm as user\n"
        "before = user.rms_norm_batch_invariant.__module__\n"
        "from batch_invariant_ops.integrations import vllm as integration\n"
        "import os; os.environ['BATCH_INVARIANT'] = '1'; integration.register()\n"
        "print(before, user.rms_norm_batch_invariant.__module__)",
        path=[ROOT],
    )
    before, after = done.stdout.splitlines()[-1].split()
    assert before.startswith("vllm.") and after == OURS, done.stderr


CARD = """
import vllm.platforms as platforms
def say_that_a_card_is_there():
    platforms.current_platform.is_cuda = lambda: True
    platforms.current_platform.get_device_capability = lambda: platforms.interface.DeviceCapability(9, 0)
"""


@needs_vllm
@pytest.mark.parametrize("switch", ["0", "1"])
def test_compilation_stays_on_where_vllms_own_mode_would_give_it_up(switch):
    """A model that one of vLLM's tuned tables has a shape of; the card is only said to be there."""
    done = python(
        CARD + "say_that_a_card_is_there()\n"
        "from types import SimpleNamespace as Is\n"
        "import torch\n"
        "from vllm.config.vllm import VllmConfig\n"
        "model = Is(enforce_eager=False, dtype=torch.bfloat16, quantization=None, get_hidden_size=lambda: 2048,\n"
        "    get_head_size=lambda: 128, get_num_attention_heads=lambda parallel: 16,\n"
        "    get_num_kv_heads=lambda parallel: 8, hf_text_config=Is(intermediate_size=6144))\n"
        "config = Is(model_config=model, parallel_config=Is(tensor_parallel_size=1))\n"
        "print(VllmConfig._uses_breakable_cudagraph_for_batch_invariance(config))",
        BATCH_INVARIANT=switch,
        VLLM_BATCH_INVARIANT="1",
    )
    assert done.stdout.splitlines()[-1:] == [str(switch == "0")], done.stderr


GRAPHS = """
from types import SimpleNamespace as Is
import torch
from vllm.config.compilation import CompilationConfig, CUDAGraphMode
from vllm.config.vllm import VllmConfig
platforms.current_platform.get_device_total_memory = lambda: {gib} * 2**30
asked = dict(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE) | {asked}
config = Is(
    model_config=Is(
        enforce_eager=False, dtype=torch.bfloat16, get_num_layers=lambda parallel: {layers},
        get_num_kv_heads=lambda parallel: 8, get_head_size=lambda: 128,
    ),
    compilation_config=CompilationConfig(**asked), speculative_config=None,
    scheduler_config=Is(max_num_seqs={seqs}, max_num_batched_tokens={tokens}), uniform_decode_query_len=1,
    parallel_config=Is(tensor_parallel_size=1), performance_mode="balanced", num_speculative_tokens=0,
)
VllmConfig._set_cudagraph_sizes(config)
sizes = config.compilation_config.cudagraph_capture_sizes
print(config.compilation_config.max_cudagraph_capture_size, len(sizes), sizes[-2:])
"""


@needs_vllm
@pytest.mark.parametrize(
    "changed, expected",
    [
        ({}, "2048 63 [1920, 2048]"),
        ({"tokens": 1000}, "896 54 [768, 896]"),
        ({"switch": "0"}, "512 51 [496, 512]"),
        ({"gib": 24}, "512 51 [496, 512]"),
        ({"layers": 64}, "512 51 [496, 512]"),
        ({"layers": 64, "gib": 141}, "2048 63 [1920, 2048]"),
        ({"seqs": 16}, "32 7 [24, 32]"),
        ({"asked": "dict(cudagraph_capture_sizes=[8, 512])"}, "512 2 [8, 512]"),
        ({"asked": "dict(max_cudagraph_capture_size=512)"}, "512 51 [496, 512]"),
        ({"asked": "dict(cudagraph_mode=CUDAGraphMode.FULL)"}, "512 51 [496, 512]"),
    ],
    ids=str,
)
def test_a_fast_card_has_graphs_for_the_steps_of_prompts_unless_the_user_chose_sizes(changed, expected):
    given = {"gib": 80, "layers": 32, "seqs": 1024, "tokens": 8192, "asked": "{}", "switch": "1"} | changed
    switch = given.pop("switch")
    done = python(CARD + "say_that_a_card_is_there()\n" + GRAPHS.format(**given), BATCH_INVARIANT=switch)
    assert done.stdout.splitlines()[-1:] == [expected], done.stderr


@needs_vllm
@pytest.mark.parametrize("backend", ["None", "AttentionBackendEnum.FLASH_ATTN"])
def test_a_model_with_a_sliding_window_has_tritons_attention_unless_the_user_chose(backend):
    """Before vLLM's configuration is finished, and on a card that is only said to be there."""
    done = python(
        CARD + "from types import SimpleNamespace as Is\n"
        "import torch\n"
        "from vllm.config.vllm import VllmConfig\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "from batch_invariant_ops.integrations import vllm as integration\n"
        "choose = integration._choose_attention\n"
        "def choose_for_a_card(config):\n"
        "    say_that_a_card_is_there()\n"
        "    model = Is(disable_sliding_window=False, get_sliding_window=lambda: 512, dtype=torch.bfloat16,\n"
        "        max_model_len=4096, use_mla=False)\n"
        "    attention = Is(backend=" + backend + ")\n"
        "    choose(Is(model_config=model, attention_config=attention))\n"
        "    print('CHOSEN', attention.backend.name, flush=True)\n"
        "    raise SystemExit\n"
        "integration._choose_attention = choose_for_a_card\n"
        "VllmConfig()",
        BATCH_INVARIANT="1",
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("CHOSEN")]
    assert line.split()[1] == ("TRITON_ATTN" if backend == "None" else "FLASH_ATTN"), done.stderr
    assert (
        "attention by TRITON_ATTN: FlashAttention is not batch invariant with a sliding window, of 512 here"
        in done.stderr
    ) is (backend == "None")


FAILS_CLOSED = """
import vllm.model_executor.determinism.batch_invariant as seam
print('imported', flush=True)
seam.init_batch_invariance()
print('served', flush=True)
"""


@needs_vllm
@pytest.mark.parametrize(
    "env, reason",
    [
        ({"VLLM_BATCH_INVARIANT": "0"}, "VLLM_BATCH_INVARIANT='0' contradicts BATCH_INVARIANT=1"),
        ({"VLLM_CPU_ATTN_SPLIT_KV": "1"}, "VLLM_CPU_ATTN_SPLIT_KV='1' contradicts BATCH_INVARIANT=1"),
    ],
)
def test_a_process_that_would_load_a_model_stops_with_one_message(env, reason):
    done = python(FAILS_CLOSED, BATCH_INVARIANT="1", **env)
    assert "imported" in done.stdout and "served" not in done.stdout
    assert done.returncode != 0
    assert sum(reason in line for line in done.stderr.splitlines()) == 1, done.stderr


@needs_vllm
def test_an_unknown_release_is_refused_with_the_supported_ones():
    done = python("import vllm.version; vllm.version.__version__ = '0.99.0'\n" + FAILS_CLOSED, BATCH_INVARIANT="1")
    assert "served" not in done.stdout and done.returncode != 0
    assert "vLLM 0.99.0 is not supported; supported releases: 0.19.1, 0.26.0, 0.32.0" in done.stderr


@needs_vllm
def test_the_same_process_serves_when_nothing_failed():
    done = python(FAILS_CLOSED, BATCH_INVARIANT="1")
    assert done.returncode == 0 and "served" in done.stdout, done.stderr


@needs_vllm
@pytest.mark.parametrize("mode, asked, used", [("1", None, False), ("1", "1", True), ("0", None, True)])
def test_no_sampler_is_left_to_be_compiled_by_nvcc_unless_asked_for(mode, asked, used):
    code = "import vllm.envs; print(vllm.envs.VLLM_USE_FLASHINFER_SAMPLER)"
    done = python(code, BATCH_INVARIANT=mode, **({} if asked is None else {"VLLM_USE_FLASHINFER_SAMPLER": asked}))
    assert done.stdout.split() == [str(used)], done.stderr


@needs_vllm
def test_the_debug_log_says_what_was_swapped_where():
    done = python(FAILS_CLOSED, BATCH_INVARIANT="1", BATCH_INVARIANT_LOG="debug")
    assert f"linear_batch_invariant is now {OURS}.linear" in done.stderr
    assert "is now" not in python(FAILS_CLOSED, BATCH_INVARIANT="1").stderr


@needs_vllm
def test_vllms_compile_cache_is_keyed_by_the_kits_version():
    show = "import vllm.envs as envs; print(envs.compile_factors().get('VLLM_BATCH_INVARIANT_OPS'))"
    from batch_invariant_ops import __version__

    assert python(show, BATCH_INVARIANT="1").stdout.splitlines()[-1] == __version__
    assert python(show).stdout.splitlines()[-1] == "None"


def test_every_module_that_is_patched_is_hooked_and_the_reverse():
    shown = python(
        "import sitecustomize as hook; from batch_invariant_ops.integrations import vllm as integration\n"
        "print(sorted(hook.HOOKED) == sorted(integration._PATCHES))",
        path=[ROOT],
    )
    assert shown.stdout == "True\n", shown.stdout + shown.stderr


NORM = """
import torch
from vllm.config import VllmConfig, set_current_vllm_config
import vllm.model_executor.layers.layernorm as layernorm
with set_current_vllm_config(VllmConfig()):
    norm = layernorm.RMSNorm(8, eps=1e-5)
x, residual = torch.randn(3, 8), torch.randn(3, 8)
print('cpu', norm.forward_native(x).shape == (3, 8), len(norm.forward_native(x, residual)))
with torch._subclasses.FakeTensorMode():
    x = torch.empty(3, 8, device='cuda')
    norm.weight = torch.nn.Parameter(torch.empty(8, device='cuda'))
    from torch.fx.experimental.proxy_tensor import make_fx
    print('traced', make_fx(lambda x: norm.forward_native(x))(x).code)
    print('with residual', make_fx(lambda x: norm.forward_native(x, x)[0])(x).code)
"""


@needs_vllm
def test_the_norm_is_one_opaque_kernel_on_a_gpu_and_vllms_own_code_on_a_cpu():
    shown = python(NORM, BATCH_INVARIANT="1").stdout
    assert "cpu True 2" in shown
    traced, with_residual = shown.split("traced")[1].split("with residual")
    assert "batch_invariant_ops.rms_norm" in traced and "mean" not in traced
    assert "batch_invariant_ops.fused_add_rms_norm" in with_residual and "mean" not in with_residual
    assert "batch_invariant_ops.rms_norm" not in python(NORM).stdout


FLEX = """
import torch._dynamo.config
import vllm.v1.attention.backends.flex_attention
print(torch._dynamo.config.recompile_limit)
"""


@needs_vllm
def test_flex_attention_may_be_compiled_for_more_kinds_of_batches_than_vllm_lets_it():
    assert int(python(FLEX, BATCH_INVARIANT="1").stdout) > int(python(FLEX).stdout)


AHEAD_OF_TIME = """
import os, torch
import vllm.envs as envs
from vllm.model_executor.determinism import batch_invariant
from batch_invariant_ops.integrations import vllm as integration
integration._enable = lambda: None
batch_invariant.init_batch_invariance()
print(envs.VLLM_USE_AOT_COMPILE, os.environ.get("VLLM_USE_AOT_COMPILE"))
integration._release = lambda: "0.26.0"
torch.version.cuda = "13.0"
print(envs.VLLM_USE_AOT_COMPILE)
"""


@needs_vllm
@pytest.mark.parametrize(
    "asked, here, on_a_gpu",
    [
        ({}, "False None", "True"),
        ({"VLLM_USE_AOT_COMPILE": "0"}, "False 0", "False"),
        ({"VLLM_USE_AOT_COMPILE": "1"}, "True 1", "True"),
        ({"VLLM_DISABLE_COMPILE_CACHE": "1"}, "False None", "False"),
    ],
    ids=str,
)
def test_compilation_ahead_of_time_is_for_who_asks_and_where_it_is_known_to_hold(asked, here, on_a_gpu):
    """vLLM's mode turns it off, also where it was asked for, and in the environment of every child."""
    done = python(AHEAD_OF_TIME, BATCH_INVARIANT="1", **asked)
    assert done.stdout.splitlines() == [here, on_a_gpu], done.stderr


PRECISION = """
import torch
import vllm.envs
from batch_invariant_ops import mode, vendor
from batch_invariant_ops.integrations import vllm as integration
vendor.prepare = mode.enable_batch_invariant_mode = lambda: None
torch.cuda.is_available = lambda: True
integration._enable()
"""


@needs_vllm
@pytest.mark.parametrize("asked, said", [("high", True), ("highest", False), (None, False)])
def test_a_precision_that_a_gpus_worker_does_not_follow_is_told(asked, said):
    done = python(PRECISION, BATCH_INVARIANT="1", **({} if asked is None else {"VLLM_FLOAT32_MATMUL_PRECISION": asked}))
    assert done.returncode == 0, done.stderr
    assert (f"VLLM_FLOAT32_MATMUL_PRECISION={asked} is not followed" in done.stderr) is said
