"""A process that compiles our kernel for a card, without one, into Triton's cache: there the measuring process looks.

{"tile": [...], "m": 8, "n": 4096, "k": 4096, "dtype": "bfloat16", "capability": [9, 0]}
→ {"shared": bytes of shared memory} or {"error": "why not"}
"""

from __future__ import annotations

from typing import Any

import torch

from batch_invariant_ops.ops import matmul
from batch_invariant_ops.tiles import Tile
from batch_invariant_ops.tuning.child import serve


class _Elsewhere:
    """Stands for a device of another machine, as far as Triton's compiler asks for one."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device: one for each capability

    def get_current_stream(self, device: int) -> int:
        return 0


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Compile one tile."""
    from triton.runtime.driver import driver

    major, minor = question["capability"]
    driver.set_active(_Elsewhere(10 * major + minor))  # type: ignore[arg-type]
    dtype = getattr(torch, question["dtype"])
    x = torch.empty(question["m"], question["k"], dtype=dtype, device="meta")
    w = torch.empty(question["n"], question["k"], dtype=dtype, device="meta")
    try:
        kernel = matmul.warm_up(x, w.t(), tile=Tile(*question["tile"]))
    except Exception as error:  # whatever a compiler may raise
        lines = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
    return {"shared": kernel.metadata.shared}


if __name__ == "__main__":
    serve(answer)
