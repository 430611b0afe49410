"""FlashAttention 3 with one length of step along the keys, whatever the batch holds.

``hopper/flash_api.cpp`` and ``hopper/tile_size.h`` in github.com/vllm-project/flash-attention choose the kernel's tile
by the head size and by four things that follow the longest query or context of the whole batch:

- a longest query of 1 is taken for not causal, except with heads of 65 to 128 over a paged cache;
- with heads of 64 and of 128, at most 64 rows of queries (the longest query times the query heads of a key head) go to
  one warp group, whose steps for heads of 64 are longer;
- a paged cache whose page is a multiple of a step is read by the copy engine where the rows are more than a tile, and
  then a step may be longer;
- a window that reaches over the longest context is none.

So the same row may be added up in other steps, and have other bits, beside a prompt than beside answers. Told of a
longest query and context that are beyond each of these bounds, it always takes one way. It reads the true lengths from
the device and computes the same attention. Larger heads over pages of 16 have one step either way: those of 128 keep
the one warp group, which is the faster for few rows.

With a window that is shorter than the context this does not help: the steps then begin at the first key that a tile of
queries sees (``hopper/block.h``), so :func:`.attention.automatic_backend` chooses another backend for such a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

ROWS_OF_A_TILE = 192
"""The most that any of its tiles has."""
SHORTEST_STEP = 64


def bounds(head_size: int, page_size: int, window: int) -> tuple[int, int]:
    """The least longest query and longest context, in tokens, to tell of.

    Args:
        head_size: of a query head.
        page_size: of the paged cache, in tokens; 0 without one.
        window: how many earlier tokens a query sees besides its own; negative without a window.
    """
    copied = page_size >= SHORTEST_STEP
    query = ROWS_OF_A_TILE + 1 if head_size <= 64 or copied or not page_size else 1
    return query, window + 2 if window >= 0 else 1


def with_one_step(attend: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's ``flash_attn_varlen_func``, told of :func:`bounds` where it runs FlashAttention 3."""
    names = tuple(inspect.signature(attend).parameters)

    @wraps(attend)
    def attend_with_one_step(*args: Any, **call: Any) -> Any:
        call |= zip(names, args, strict=False)
        if call.get("fa_version") == 3:
            cache = call["k"] if call.get("block_table") is not None else None
            window = call.get("window_size")
            query, context = bounds(
                call["q"].shape[-1], 0 if cache is None else cache.shape[1], -1 if window is None else window[0]
            )
            if call["max_seqlen_q"] < query or call["max_seqlen_k"] < context:
                # a plan made ahead is one for the tile of the true lengths
                call["scheduler_metadata"] = None
            call["max_seqlen_q"] = max(call["max_seqlen_q"], query)
            call["max_seqlen_k"] = max(call["max_seqlen_k"], context)
        return attend(**call)

    return attend_with_one_step
