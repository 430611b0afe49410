"""A server's attention, tried on the device at hand before it answers: has a row the same bits whatever is beside it?

Backends choose their kernels by what the whole batch holds: prompts or answers alone, the longest query, the longest
context, the number of requests. So one sequence is computed by the engine's own layers, metadata builders and KV cache
in batches that differ in all of these, as a whole, as a piece and as single tokens, and its rows are compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from batch_invariant_ops.integrations import unproven
from batch_invariant_ops.proof import same_bits

LENGTH = 777
"""Tokens that are compared from the first on: several of the longest steps along the keys that a kernel takes."""
LONG, END = 5000, 100
"""Tokens of the whole sequence, and how many of its last are compared: more than a batch has, as those of a long prompt
that is computed in pieces."""
ANSWERS = (1, 65, 130, 200, 333, 500, 640, LENGTH)
"""After how many tokens of it the last is computed by itself, as a token of an answer is."""
BESIDE = (5, 64, 129, 555, 1030)
"""The contexts beside it, in tokens."""
SEED = 0
FLASH, TRITON = unproven.FLASH_ATTENTION, "TRITON_ATTN"


def automatic_backend(model: Any, capability: tuple[int, int] | None) -> tuple[str, str]:
    """The backend of a model that none was asked for, and why it is that one, or nothing where it is FlashAttention.

    FlashAttention is the faster. With a sliding window its version 3 begins to step along the keys at the first one
    that a tile of queries sees, so that a row's steps depend on the rows computed with it
    (github.com/vllm-project/flash-attention, ``hopper/block.h``).

    Args:
        model: vLLM's ``ModelConfig``.
        capability: compute capability of the GPU, where it is known.
    """
    window = None if model.disable_sliding_window else model.get_sliding_window()
    if capability is not None and capability < (8, 0):
        return TRITON, f"FlashAttention needs compute capability 8.0, and this is {'.'.join(map(str, capability))}"
    if model.dtype == torch.float32:
        return TRITON, "FlashAttention does not compute in float32"
    if window is not None and window < model.max_model_len:
        return TRITON, f"FlashAttention is not batch invariant with a sliding window, of {window} here"
    return FLASH, ""


@dataclass(frozen=True)
class Request:
    """A part of a batch: the rows [start, stop) of a sequence, ``stop`` of whose tokens are then in the KV cache."""

    start: int
    stop: int
    compared: bool = False


@dataclass(frozen=True)
class Verdict:
    """What was seen of one kind of layer: in which batches its rows had other bits."""

    layer: str
    tried: int
    differing: tuple[str, ...]
    seconds: float

    def line(self) -> str:
        verdict = f"other bits {', '.join(self.differing)}" if self.differing else "the same bits in all"
        return f"attention, {self.layer}: {self.tried} batches, {self.seconds:.1f} s: {verdict}"

    def finding(self) -> str:
        """Why it is refused, in the words of :mod:`.unproven`."""
        return f"{self.layer}, which has other bits {self.differing[0]} ({unproven.WAY_OUT})"


Batch = list[Request]


def batches(
    longest: int, most_rows: int, most_requests: int, window: int | None, room: int = LONG
) -> dict[str, list[Batch]]:
    """By what they are like: batches around one sequence, which they compute in whole or in part.

    Args:
        longest: context that a request may have, in tokens.
        most_rows: that a batch may have.
        most_requests: that a batch may have.
        window: how many tokens a query sees, or None for all.
        room: tokens that the KV cache has.

    Returns:
        The batches by name; those that are "alone" compute every row that others are compared in.
    """
    length, long = min(LENGTH, longest, most_rows, room), min(LONG, longest, room)
    end = long - min(END, most_rows)
    contexts = [min(context, longest) for context in (*BESIDE, *([window + 65] if window else ()))]
    beside = [Request(context - 1, context) for context in contexts]
    last = [Request(stop - 1, stop, True) for stop in sorted({min(stop, length) for stop in ANSWERS})]
    whole, piece = Request(0, length, True), Request(length // 3, length, True)
    made = {
        "alone": [[whole]],
        "as an answer alone": [[one] for one in last],
        "as an answer beside answers": [[*beside[:2], one, *beside[2:]] for one in last],
        "as an answer beside many": [[*(beside * 13)[:63], one] for one in last],
        "as an answer beside the longest": [[Request(longest - 1, longest), one] for one in last],
        "as an answer beside a short prompt": [[Request(0, min(7, longest)), one] for one in last],
        "as an answer beside a prompt": [[one, Request(0, min(130, longest))] for one in last],
        "as a piece of a prompt beside answers": [[*beside, piece]],
        "as a prompt beside all": [[Request(0, min(70, longest)), *beside, whole]],
    }
    if end >= length:
        rest, answer = Request((end + long) // 2, long, True), Request(long - 1, long, True)
        made["alone"].append([Request(end, long, True)])
        made["after a long prompt"] = [[rest], [*beside, rest], [answer], [*beside, answer]]
    return {name: [fitting(one, most_rows, most_requests) for one in several] for name, several in made.items()}


def fitting(requests: Batch, most_rows: int, most_requests: int) -> Batch:
    """What of a batch an engine could take, what is compared before all else."""
    rows, kept = sum(one.stop - one.start for one in requests if one.compared), 1
    found = []
    for one in requests:
        if not one.compared:
            if kept == most_requests or rows + one.stop - one.start > most_rows:
                continue
            rows, kept = rows + one.stop - one.start, kept + 1
        found.append(one)
    return found


class Sequence:
    """The sequence that is compared, as one layer sees it: its queries, and its keys and values in pages of the cache.

    Other requests read those pages as theirs: what they hold does not matter, only how much.
    """

    def __init__(self, layer: Any, page: int, length: int, dtype: torch.dtype, metadata: Any) -> None:
        self.layer, self.page, self.metadata = layer, page, metadata
        self.cache = layer.kv_cache[0] if isinstance(layer.kv_cache, (list, tuple)) else layer.kv_cache
        self.device = self.cache.device
        generator = torch.Generator(device=self.device).manual_seed(SEED)

        def rows(heads: int) -> torch.Tensor:
            return torch.randn(length, heads, layer.head_size, generator=generator, device=self.device).to(dtype)

        self.query, self.key, self.value = rows(layer.num_heads), rows(layer.num_kv_heads), rows(layer.num_kv_heads)
        self.pages = torch.arange(-(-length // page), dtype=torch.int32, device=self.device)
        places = torch.arange(length, device=self.device)
        self.slots = self.pages[places // page].long() * page + places % page
        self.write(self.key, self.value)

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Into the pages; the engine has no request yet whose they could be."""
        self.layer.impl.do_kv_cache_update(self.layer, key, value, self.cache, self.slots)

    def attend(self, builder: Any, requests: Batch) -> tuple[torch.Tensor, Request]:
        """The output [rows, heads, head size] of the compared request's rows in that batch, and which these are."""
        ((index, compared),) = ((i, one) for i, one in enumerate(requests) if one.compared)
        counts = torch.tensor([one.stop - one.start for one in requests], dtype=torch.int32)
        starts = torch.zeros(len(requests) + 1, dtype=torch.int32)
        starts[1:] = counts.cumsum(0)
        lengths = torch.tensor([one.stop for one in requests], dtype=torch.int32)
        places = torch.cat([torch.arange(one.start, one.stop) for one in requests]).to(self.device)
        inside = places % len(self.query)
        metadata = builder.build(0, self._metadata(starts, counts, lengths, places, self.slots[inside]))
        query = self.query[inside]
        out = torch.empty_like(query)
        self.layer.impl.forward(
            self.layer, query, self.key[inside], self.value[inside], self.cache, metadata, output=out
        )
        first = int(starts[index])
        return out[first : first + compared.stop - compared.start], compared

    def _metadata(
        self,
        starts: torch.Tensor,
        counts: torch.Tensor,
        lengths: torch.Tensor,
        places: torch.Tensor,
        slots: torch.Tensor,
    ) -> Any:
        longest = int(lengths.max())
        table = self.pages.repeat(-(-longest // (self.page * len(self.pages))))[: -(-longest // self.page)]
        known: dict[str, Any] = {
            "query_start_loc": starts.to(self.device),
            "query_start_loc_cpu": starts,
            "seq_lens": lengths.to(self.device),
            "seq_lens_cpu_upper_bound": lengths,
            "_seq_lens_cpu": lengths,
            "_num_computed_tokens_cpu": lengths - counts,
            "num_reqs": len(counts),
            "num_actual_tokens": int(starts[-1]),
            "max_query_len": int(counts.max()),
            "max_seq_len": longest,
            "block_table_tensor": table.repeat(len(counts), 1),
            "slot_mapping": slots,
            "positions": places,
            "causal": True,
        }
        fields = self.metadata.__dataclass_fields__
        return self.metadata(**{name: value for name, value in known.items() if name in fields})


@torch.inference_mode()
def tried(config: Any, runner: Any, metadata: Any) -> Iterator[Verdict]:
    """What each kind of the engine's attention layers gives in each batch; the first layer of a kind is tried.

    Args:
        config: vLLM's.
        runner: of the worker, after its KV cache was made.
        metadata: vLLM's ``CommonAttentionMetadata``.

    Raises:
        Exception: whatever an engine raises whose parts are not those that are known here.
    """
    layers = config.compilation_config.static_forward_context
    seen = set()
    for group in (group for groups in runner.attn_groups for group in groups):
        builder = group.get_metadata_builder(0)
        for name in group.layer_names:
            layer = layers[name]
            window = getattr(layer, "sliding_window", None)
            kind = (group.backend.get_name(), layer.head_size, layer.num_heads, layer.num_kv_heads, window)
            if kind not in seen:
                seen.add(kind)
                num_blocks = runner.kv_cache_config.num_blocks
                yield _try(config, builder, layer, window, described(*kind), metadata, num_blocks)


def described(backend: str, head_size: int, heads: int, kv_heads: int, window: int | None) -> str:
    seen = f", a window of {window}" if window else ""
    return f"{backend} with {heads} heads of {head_size} over {kv_heads}{seen}"


def _try(
    config: Any, builder: Any, layer: Any, window: int | None, kind: str, metadata: Any, num_blocks: int
) -> Verdict:
    begin = time.perf_counter()
    limits = config.scheduler_config
    longest = config.model_config.max_model_len
    page, dtype = builder.kv_cache_spec.block_size, config.model_config.dtype
    made = batches(longest, limits.max_num_batched_tokens, limits.max_num_seqs, window, num_blocks * page)
    sequence = Sequence(layer, page, max(one.stop for (one,) in made["alone"]), dtype, metadata)
    reference = torch.empty_like(sequence.query)
    for requests in made["alone"]:
        rows, which = sequence.attend(builder, requests)
        reference[which.start : which.stop] = rows

    def differs(requests: Batch) -> bool:
        rows, which = sequence.attend(builder, requests)
        return not same_bits(rows.contiguous(), reference[which.start : which.stop].contiguous())

    differing = tuple(name for name, several in made.items() if any(map(differs, several)))
    sequence.write(torch.zeros_like(sequence.key), torch.zeros_like(sequence.value))
    return Verdict(kind, sum(map(len, made.values())), differing, time.perf_counter() - begin)
