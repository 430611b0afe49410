"""Seeded requests on vLLM's CPU build, which ends where it computes such a request's prompt in pieces.

After each piece but the last, vLLM takes back the number that was drawn for nothing by setting its generator's offset
back. A CPU's generator has none ("CPU Generator does not use offset"), and the engine stops with all its requests.
"""

from __future__ import annotations

from typing import Any

import torch


class Rewinding(torch.Generator):
    """A generator of a CPU that an offset takes back to where it was before the last numbers were drawn."""

    original: torch.Generator
    before: torch.Tensor

    @classmethod
    def like(cls, original: torch.Generator) -> Rewinding:
        made = cls()
        made.original, made.before = original, original.get_state()
        made.set_state(made.before)
        return made

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> Rewinding:
        self.set_state(self.before)
        return self


class Generators(dict[int, Any]):
    """A batch's generators by request; samplers ask for its items right before they draw.

    A request that leaves the batch, preempted maybe, takes along what was drawn: vLLM puts its own generator in again.
    """

    def __setitem__(self, key: int, generator: torch.Generator) -> None:
        super().__setitem__(key, generator if isinstance(generator, Rewinding) else Rewinding.like(generator))

    def pop(self, key: int, *default: Any) -> Any:
        found = super().pop(key, *default)
        if isinstance(found, Rewinding):
            found.original.set_state(found.get_state())
        return found

    def items(self) -> Any:
        for generator in self.values():
            generator.before = generator.get_state()
        return super().items()
