"""Installs the batch-invariance import hook in every Python process that has this folder on its path.

With ``BATCH_INVARIANT=1`` one finder goes on ``sys.meta_path``. It waits for the modules of vLLM that
``batch_invariant_ops.integrations.vllm`` replaces parts of, and hands each over right after it ran, before its users
copy names out of it. Nothing else is imported here: a Python process that never imports vLLM pays microseconds.
"""

import os
import sys
from _frozen_importlib_external import PathFinder  # importlib.machinery is the same class behind a slower import

HERE = os.path.dirname(os.path.abspath(__file__))
HOOKED = {
    "vllm.envs",
    "vllm.config.vllm",
    "vllm.model_executor.layers.batch_invariant",
    "vllm.model_executor.determinism.batch_invariant",
    "vllm.model_executor.layers.layernorm",
    "vllm.model_executor.layers.utils",
    "vllm.v1.sample.ops.topk_topp_sampler",
    "vllm.v1.sample.sampler",
    "vllm.v1.worker.gpu.sample.logprob",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.flex_attention",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.worker.gpu_input_batch",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.metrics.prometheus",
}


class BatchInvariantHook:
    """Finds a hooked module as Python would have, and lets the integration see it once it has run."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in HOOKED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run_module = spec.loader.exec_module

        def exec_module(module):
            run_module(module)
            if os.path.dirname(HERE) not in sys.path:
                sys.path.append(os.path.dirname(HERE))
            from batch_invariant_ops.integrations import vllm as integration

            integration.patch(module)

        spec.loader.exec_module = exec_module
        return spec


def run_next_sitecustomize():
    """Run the sitecustomize that this one hides, if there is one further down the path."""
    others = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != HERE]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = type(sys)("sitecustomize")
        module.__spec__, module.__file__ = spec, spec.origin
        spec.loader.exec_module(module)


if os.environ.get("BATCH_INVARIANT") == "1":
    sys.meta_path.insert(0, BatchInvariantHook)
run_next_sitecustomize()
