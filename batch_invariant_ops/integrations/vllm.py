"""The one file that knows vLLM's names: puts our kernels where vLLM's batch-invariant mode has its own.

vLLM's mode (``VLLM_BATCH_INVARIANT=1``) stays on: attention, all-reduce and scheduling follow it. What is replaced is
what costs it its speed or its bits: the linear layer, the norms, the aten operations, and on a CPU, where vLLM has no
batch-invariant mode of its own, the linear layers' dispatch.

Two ways lead here. ``vllm/sitecustomize.py`` calls :func:`patch` for each hooked module right after it ran, in every
process, forked or spawned. The entry point ``vllm.general_plugins`` calls :func:`register`, for an installation by pip.

A process that loads a model goes through vLLM's ``init_batch_invariance`` and ``Worker.load_model``. If anything here
failed, or the check after loading does not hold, that process stops with one message: a server that is not batch
invariant never answers.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from batch_invariant_ops._version import __version__

SEAM_BY_RELEASE = {
    "0.19.1": "vllm.model_executor.layers.batch_invariant",
    "0.26.0": "vllm.model_executor.layers.batch_invariant",
    "0.32.0": "vllm.model_executor.determinism.batch_invariant",
}
USERS_OF_THE_SEAM = (
    "vllm.model_executor.layers.linear",
    "vllm.model_executor.layers.layernorm",
    "vllm.model_executor.layers.vocab_parallel_embedding",
)
VLLMS_LARGEST_GRAPH = 512
BLOCK, BLOCKS_IN_MEMORY = 16, 16
"""Tokens of a block of KV cache; and how often as much memory as is tried with must be there."""
KINDS_OF_BATCHES = 64
"""For which FlexAttention may be compiled in one process."""
REQUIRED_ENVIRONMENT = {"VLLM_BATCH_INVARIANT": "1", "VLLM_CPU_ATTN_SPLIT_KV": "0"}
DEFAULT_ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
"""What is set where the user did not: FlashInfer's sampler is compiled by nvcc at the first start, which takes two
minutes where there is one, and only ever draws for requests without a seed."""

logger = logging.getLogger("batch_invariant_ops")
_failure: str | None = None
_patched: set[str] = set()


def enabled() -> bool:
    """Whether the switch ``BATCH_INVARIANT`` is on in this process."""
    return os.environ.get("BATCH_INVARIANT") == "1"


def supported_releases() -> list[str]:
    return list(SEAM_BY_RELEASE)


def register() -> None:
    """vLLM's plugin entry point: patches what is there, and what vLLM copied from it before plugins were loaded."""
    if not enabled():
        return
    for name in _PATCHES:
        if name not in _patched and name in {*_PATCHES} - {*SEAM_BY_RELEASE.values()} | {_seam()}:
            patch(importlib.import_module(name))


def patch(module: ModuleType) -> None:
    """Replace the parts of one of vLLM's modules, named in the table below; a failure is kept for :func:`_require`."""
    global _failure
    _configure_logging()
    if module.__name__ in _patched:
        return
    try:
        _PATCHES[module.__name__](module)
    except Exception as error:
        _failure = f"{module.__name__} could not be patched: {error or type(error).__name__}"
        logger.debug(_failure, exc_info=True)
    _patched.add(module.__name__)
    logger.debug("patched %s in process %d", module.__name__, os.getpid())


def _release() -> str:
    from vllm.version import __version__ as version

    return version.split("+")[0]


def _seam() -> str | None:
    return SEAM_BY_RELEASE.get(_release())


def _unsupported() -> str:
    return f"vLLM {_release()} is not supported; supported releases: {', '.join(SEAM_BY_RELEASE)}"


def _patch_envs(envs: ModuleType) -> None:
    """Set the switches that vLLM's mode and the vendor's libraries read, before any of them is read."""
    from batch_invariant_ops import status, vendor

    for name, value in REQUIRED_ENVIRONMENT.items():
        if os.environ.get(name, value) != value:
            raise ValueError(f"{name}={os.environ[name]!r} contradicts BATCH_INVARIANT=1, which needs {value!r}")
        os.environ[name] = value
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    vendor.set_environment()
    status.announce()
    if _seam() is None:
        raise ValueError(_unsupported())
    # vLLM's compile cache is keyed by its environment variables: an entry of our own keeps a graph that was compiled
    # with another version of these kernels from being used again.
    envs.environment_variables["VLLM_BATCH_INVARIANT_OPS"] = lambda: __version__
    envs.environment_variables["VLLM_USE_AOT_COMPILE"] = lambda: _ahead_of_time(envs)


def _ahead_of_time(envs: ModuleType) -> bool:
    """Whether a start takes what another compiled and traced, as plain vLLM's does and its mode's does not.

    That spares a start of a model of 32 layers some 5 s of tracing. vLLM keeps it by the same key as its compile cache,
    and drops it when a file that was traced has changed. On a GPU, a server of each supported release was seen to have
    the same bits with what it had not compiled itself.
    """
    import torch

    if "VLLM_USE_AOT_COMPILE" in os.environ:
        return os.environ["VLLM_USE_AOT_COMPILE"] == "1"
    return torch.version.cuda is not None and not envs.disable_compile_cache()


def _patch_config(config: ModuleType) -> None:
    """Leave torch.compile on where vLLM 0.32 turns it off; choose attention and CUDA graphs where the user did not.

    vLLM turns it off so that its kernels' tiles can be chosen by M. Ours are chosen inside an opaque operation, which
    compiled code reaches with the M of the run.
    """
    name = "_uses_breakable_cudagraph_for_batch_invariance"
    if hasattr(config.VllmConfig, name):
        setattr(config.VllmConfig, name, lambda self: False)
    finish = config.VllmConfig.__post_init__

    def choose_attention_and_finish(self: Any) -> None:
        _choose_attention(self)
        finish(self)

    config.VllmConfig.__post_init__ = choose_attention_and_finish
    set_sizes = config.VllmConfig._set_cudagraph_sizes

    def set_sizes_and_more(self: Any) -> None:
        compilation = self.compilation_config
        asked = (compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size) != (None, None)
        set_sizes(self)
        if not asked:
            _capture_prompts(self)

    config.VllmConfig._set_cudagraph_sizes = set_sizes_and_more


def _choose_attention(config: Any) -> None:
    """Before anything else goes by it: vLLM's own choice may be one that is not batch invariant, or refused by it."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from batch_invariant_ops.integrations import attention

    model, chosen = config.model_config, config.attention_config
    if model is None or model.use_mla or chosen.backend is not None or not current_platform.is_cuda():
        return
    name, why = attention.automatic_backend(model, current_platform.get_device_capability())
    if why:
        logger.info("attention by %s: %s", name, why)
    chosen.backend = AttentionBackendEnum[name]


def _capture_prompts(config: Any) -> None:
    """Have CUDA graphs also for the steps of middling prompts, unless the user chose sizes.

    vLLM's reach to 512 tokens. A step that no graph launches takes the host of an H100 or H200 longer than the GPU, up
    to some 1000 tokens, and through our operations up to 2000. Cards that are slower are left as they are, and those on
    which memory is short: vLLM 0.19.1 tries its graphs with a block of KV cache for each token of the largest.
    """
    from vllm.platforms import current_platform

    from batch_invariant_ops.tiles import STEPS

    compilation = config.compilation_config
    sizes = compilation.cudagraph_capture_sizes
    if not sizes or sizes[-1] < VLLMS_LARGEST_GRAPH or compilation.cudagraph_mode.mixed_mode().name != "PIECEWISE":
        return
    capability = current_platform.get_device_capability()
    if capability is None or capability.major < 9:
        return
    model, parallel = config.model_config, config.parallel_config
    heads = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    blocks = 2 * heads * model.get_head_size() * model.dtype.itemsize * BLOCK * STEPS[-1]
    if current_platform.get_device_total_memory() < BLOCKS_IN_MEMORY * blocks:
        return
    more = [size for size in STEPS if sizes[-1] < size <= config.scheduler_config.max_num_batched_tokens]
    compilation.cudagraph_capture_sizes = [*sizes, *more]
    compilation.max_cudagraph_capture_size = compilation.cudagraph_capture_sizes[-1]
    compilation.post_init_cudagraph_sizes()


def _patch_seam(seam: ModuleType) -> None:
    replacements: dict[str, Callable[..., Any]] = {
        "init_batch_invariance": _init_batch_invariance,
        "enable_batch_invariant_mode": _enable,
        "linear_batch_invariant": linear,
        "rms_norm_batch_invariant": rms_norm,
    }
    for name in replacements:
        if not hasattr(seam, name):
            raise AttributeError(f"vLLM {_release()} has no {seam.__name__}.{name}")
    for name, ours in replacements.items():
        theirs = getattr(seam, name)
        setattr(seam, name, ours)
        for user in filter(None, map(sys.modules.get, USERS_OF_THE_SEAM)):
            if getattr(user, name, None) is theirs:
                setattr(user, name, ours)
        logger.debug("%s.%s is now %s.%s", seam.__name__, name, ours.__module__, ours.__qualname__)


def _patch_layernorm(layernorm: ModuleType) -> None:
    """Give vLLM's compiler one kernel for the norm on a GPU, where it would trace vLLM's plain torch code.

    That code's mean becomes our opaque op while the mode is on, and the compiler then makes three kernels of a norm
    that is one kernel here, with the order of its sum written in the contract.
    """
    native = layernorm.RMSNorm.forward_native

    def forward_native(self: Any, x: Any, residual: Any = None) -> Any:
        if not x.is_cuda or self.variance_size_override is not None:
            return native(self, x, residual)
        weight = self.weight.data if self.has_weight else None
        return rms_norm(x, weight, self.variance_epsilon, residual)

    layernorm.RMSNorm.forward_native = forward_native


def _patch_layer_utils(utils: ModuleType) -> None:
    """Put every unquantized linear layer on a CPU behind the proven op."""
    dispatch = getattr(utils, "dispatch_cpu_unquantized_gemm", None)
    if dispatch is None:
        return

    def dispatch_proven(layer: Any, remove_weight: bool) -> None:
        from batch_invariant_ops.ops import proven

        weight = layer.weight
        if not enabled() or weight.is_meta or weight.ndim != 2:
            return dispatch(layer, remove_weight)
        (n, k), dtype = weight.shape, weight.dtype
        dispatch(layer, remove_weight)
        proof = proven.ProvenLinear(layer.cpu_linear, n, k, dtype, _windows_of(layer.cpu_linear, n, k, dtype))
        bias = getattr(layer, "bias", None)
        if (bias is not None) not in proof.windows:
            proof.prove(layer.weight, bias)
        number = proven.register(proof)
        layer.cpu_linear = lambda x, weight, bias: proven.proven_linear(x, weight, bias, number, n)

    setattr(utils, dispatch.__name__, dispatch_proven)


def _windows_of(vendor: Callable[..., Any], n: int, k: int, dtype: Any) -> dict[bool, Any]:
    """Windows shared by all layers of one shape that run the same vendor function: equal layers are proven once."""
    return _shared_windows.setdefault((vendor.__code__, n, k, dtype), {})


_shared_windows: dict[tuple[Any, ...], dict[bool, Any]] = {}


def _patch_sampler(sampler: ModuleType) -> None:
    """Cut to the likeliest tokens by one kernel, a program a row; to 0.26 vLLM sorts where fewer than 8 rows are drawn.

    The two need not keep the same tokens, so a request alone could draw from others than in company.
    """
    cut = sampler.apply_top_k_top_p

    def apply_top_k_top_p(logits: Any, k: Any, p: Any) -> Any:
        if (k is None and p is None) or not (logits.is_cuda and sampler.HAS_TRITON):
            return cut(logits, k, p)
        return sampler.apply_top_k_top_p_triton(logits, k, p)

    setattr(sampler, cut.__name__, apply_top_k_top_p)


def _patch_alternatives(sampling: ModuleType) -> None:
    """Name the likeliest tokens in one order, of equal ones the first: aten's goes by the rows and by the largest k."""

    def topk(x: Any, k: int, dim: int = -1) -> Any:
        from batch_invariant_ops.ops import topk

        if dim not in (-1, x.dim() - 1):
            raise ValueError(f"topk along dimension {dim} of {x.dim()} is not what vLLM {_release()} was known to do")
        return _Largest(*topk.topk(x, k))

    class Torch(ModuleType):
        """torch, but for topk."""

        def __getattr__(self, name: str) -> Any:
            return getattr(theirs, name)

    theirs = sampling.torch
    ours = Torch("torch")
    ours.topk = topk  # type: ignore[attr-defined]
    sampling.torch = ours  # type: ignore[attr-defined]


class _Largest(NamedTuple):
    """What ``torch.topk`` returns."""

    values: Any
    indices: Any


def _patch_flash_attention(backend: ModuleType) -> None:
    """Keep FlashAttention 3's steps along the keys the same whatever the batch holds."""
    from batch_invariant_ops.integrations import flash_attention

    name = "flash_attn_varlen_func"
    if hasattr(backend, name):  # there is none on a CPU
        setattr(backend, name, flash_attention.with_one_step(getattr(backend, name)))


def _patch_flex_attention(backend: ModuleType) -> None:
    """Have it compiled for more kinds of batches than vLLM lets it: past the limit, which a server under load reached
    after the trial of its attention, the engine ends."""
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, KINDS_OF_BATCHES)


def _patch_cpu_attention(backend: ModuleType) -> None:
    """Have a CPU attend row by row."""
    builder = backend.CPUAttentionMetadataBuilder
    build = builder.build

    def build_by_rows(self: Any, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        from batch_invariant_ops.integrations import cpu_attention

        if not (self.is_cross_attention or getattr(self, "is_encoder_only_attention", False)):
            common_attn_metadata = cpu_attention.by_rows(common_attn_metadata)
        return build(self, common_prefix_len, common_attn_metadata, *args, **kwargs)

    builder.build = build_by_rows


def _patch_input_batch(input_batch: ModuleType) -> None:
    """Let a seeded request's prompt be computed in pieces on a CPU, where that stops the engine."""
    create = input_batch.InputBatch.__init__

    def create_with_generators(self: Any, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        if self.device.type == "cpu":
            from batch_invariant_ops.integrations.cpu_seeds import Generators

            self.generators = Generators()

    input_batch.InputBatch.__init__ = create_with_generators


def _patch_worker(worker: ModuleType) -> None:
    """Check the operations on the real device once the model is loaded, and attention once there is a KV cache.

    The worker stops where they do not hold.
    """
    load_model, initialize = worker.Worker.load_model, worker.Worker.initialize_from_config

    def load_model_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        _require()
        _refuse_unproven(self.vllm_config)
        result = load_model(self, *args, **kwargs)
        _check(self.vllm_config, self.device, self.model_runner.get_model())
        return result

    def initialize_and_try(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = initialize(self, *args, **kwargs)
        _try_attention(self.vllm_config, self.device, self.model_runner)
        return result

    worker.Worker.load_model = load_model_and_check
    worker.Worker.initialize_from_config = initialize_and_try


def _refuse_unproven(config: Any) -> None:
    """Stop before anything is loaded where the configuration asks for what is not proven, unless that is allowed."""
    from batch_invariant_ops.integrations import unproven

    _refuse(unproven.unproven(config))


def _refuse(what: list[str]) -> None:
    from batch_invariant_ops.integrations import unproven

    found = ", ".join(what)
    if found and not unproven.allowed():
        _stop(f"not proven to be batch invariant: {found}; {unproven.SWITCH}=1 serves it all the same")
    if found:
        logger.warning("%s=1: serving what is not proven to be batch invariant: %s", unproven.SWITCH, found)


def _check(config: Any, device: Any, model: Any) -> None:
    """Prove the model's own linear layers, check every operation, tell the result, and stop if it does not hold."""
    import torch

    from batch_invariant_ops import selfcheck, status
    from batch_invariant_ops.integrations import fingerprint
    from batch_invariant_ops.ops import linear as linear_op

    if device.type == "cuda":
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() == 2 and hasattr(module, "quant_method"):
                bias = None if getattr(module, "skip_bias_add", False) else getattr(module, "bias", None)
                linear_op.prepare(weight, bias)
    model_config = config.model_config
    shape = selfcheck.Shape(model_config.get_hidden_size(), model_config.get_vocab_size(), model_config.dtype)
    report = selfcheck.run(device, shape)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the proofs' operands and results
    numerics = fingerprint.of_worker(config, device, model)
    found = {"version": __version__, "vllm": _release(), "device": report.device, "ok": report.ok}
    status.write(found | {"numerics": numerics})
    if not report.ok:
        _stop(f"the self-check failed on {report.device}: {', '.join(report.failed)}")
    logger.info(report.line())


def _try_attention(config: Any, device: Any, runner: Any) -> None:
    """Stop where a row's attention has other bits beside others, unless the user insists; the fingerprint says so."""
    from batch_invariant_ops import status
    from batch_invariant_ops.integrations import attention, unproven

    found = []
    try:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        for verdict in attention.tried(config, runner, CommonAttentionMetadata):
            logger.info(verdict.line())
            if verdict.differing:
                found.append(verdict.finding())
    except Exception as error:
        logger.warning("attention could not be tried on this device: %s", error or type(error).__name__)
        logger.debug("trying attention", exc_info=True)
        found = unproven.attention(runner.get_model()) if device.type == "cuda" else []
    _refuse(found)
    if found:
        said = status.read()
        numerics = said.get("numerics") or {}
        numerics["unproven"] = ", ".join(filter(None, [numerics.get("unproven"), *found]))
        status.write(said | {"numerics": numerics})


def _patch_metrics(prometheus: ModuleType) -> None:
    """Add our gauges to the registry that `/metrics` shows."""
    get_registry = prometheus.get_prometheus_registry

    def get_registry_with_ours() -> Any:
        from batch_invariant_ops.integrations import prometheus as ours

        registry = get_registry()
        ours.register(registry)
        return registry

    setattr(prometheus, get_registry.__name__, get_registry_with_ours)


def _init_batch_invariance(*args: Any, **kwargs: Any) -> None:
    """Stands in for vLLM's function of this name, which a worker calls before it touches its device."""
    _require()
    seam = sys.modules[str(_seam())]
    asked = os.environ.get("VLLM_USE_AOT_COMPILE")
    seam.override_envs_for_invariance(*args, **kwargs)
    os.environ.pop("VLLM_USE_AOT_COMPILE", None)  # what it sets there would count as the user's
    if asked is not None:
        os.environ["VLLM_USE_AOT_COMPILE"] = asked
    # What was imported stays. Until vLLM freezes it, once its engine is made, it looks through all of it for garbage
    # some ten times, 0.3 s each.
    gc.freeze()
    _enable()


def _enable() -> None:
    """Stands in for vLLM's ``enable_batch_invariant_mode``."""
    import torch

    from batch_invariant_ops import vendor

    vendor.prepare()
    if torch.cuda.is_available():
        from batch_invariant_ops import mode

        asked = os.environ.get("VLLM_FLOAT32_MATMUL_PRECISION", "highest")
        if asked != "highest":  # nor does vLLM's own mode
            logger.warning("VLLM_FLOAT32_MATMUL_PRECISION=%s is not followed: fp32 is multiplied as it is", asked)
        mode.enable_batch_invariant_mode()


def _require() -> None:
    """Stop this process, which is about to load a model, unless everything that had to be patched was."""
    if _failure:
        _stop(_failure)
    if _seam() is None:
        _stop(_unsupported())
    missing = {"vllm.envs", _seam()} - _patched
    if missing:
        _stop(f"not patched: {', '.join(sorted(map(str, missing)))}")


def _stop(reason: str) -> NoReturn:
    message = f"batch_invariant_ops {__version__}: refusing to serve without batch invariance: {reason}"
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(70)


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Stands in for vLLM's ``linear_batch_invariant``: y [..., N] = x [..., K] · weight [N, K]ᵀ + bias."""
    import torch

    return torch.ops.batch_invariant_ops.gemm(x, weight.t(), bias)


def rms_norm(x: Any, weight: Any, eps: float = 1e-6, residual: Any = None) -> Any:
    """Stands in for vLLM's ``rms_norm_batch_invariant``; with a residual, returns (norm, x + residual)."""
    import torch

    if residual is None:
        return torch.ops.batch_invariant_ops.rms_norm(x, weight, eps)
    return torch.ops.batch_invariant_ops.fused_add_rms_norm(x, residual, weight, eps)


def _configure_logging() -> None:
    if logger.handlers:
        return
    level = logging.getLevelName(os.environ.get("BATCH_INVARIANT_LOG", "info").upper())
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s batch_invariant_ops: %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(level if isinstance(level, int) else logging.INFO)


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "vllm.envs": _patch_envs,
    "vllm.config.vllm": _patch_config,
    "vllm.model_executor.layers.batch_invariant": _patch_seam,
    "vllm.model_executor.determinism.batch_invariant": _patch_seam,
    "vllm.model_executor.layers.layernorm": _patch_layernorm,
    "vllm.model_executor.layers.utils": _patch_layer_utils,
    "vllm.v1.sample.ops.topk_topp_sampler": _patch_sampler,
    "vllm.v1.sample.sampler": _patch_alternatives,
    "vllm.v1.worker.gpu.sample.logprob": _patch_alternatives,
    "vllm.v1.attention.backends.flash_attn": _patch_flash_attention,
    "vllm.v1.attention.backends.flex_attention": _patch_flex_attention,
    "vllm.v1.attention.backends.cpu_attn": _patch_cpu_attention,
    "vllm.v1.worker.gpu_input_batch": _patch_input_batch,
    "vllm.v1.worker.gpu_worker": _patch_worker,
    "vllm.v1.metrics.prometheus": _patch_metrics,
}
