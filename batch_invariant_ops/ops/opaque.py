"""How our operations are made known to torch: opaque to its compiler, for GPUs and CPUs, with a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "batch_invariant_ops"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # what it defines lives as long as it does


def define(
    schema: str,
    *,
    gpu: Callable[..., Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Define ``torch.ops.batch_invariant_ops.NAME``.

    Args:
        schema: NAME with arguments and results, as ``bmm(Tensor a, Tensor b) -> Tensor``.
        gpu, cpu: compute it there.
        fake: makes an empty result of its shape and type, for compilers.
        save, backward: ``setup_context`` and ``backward`` of ``torch.library.register_autograd``.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, gpu, "CUDA")
    _library.impl(name, cpu, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=save, lib=_library)
