"""Attention on a CPU row by row, so that its steps along the keys do not depend on the rows that come with a row.

vLLM's kernel takes as many keys at a step as its cache leaves room for beside the queries that it has at once. How many
those are depends on how a prompt was cut and on the number of threads: from a context of some thousand tokens on, a row
then has other bits in another piece of its prompt. A request of one row has one way; so each row is made one. On an AMD
EPYC (Zen 5) that took 1.6 times the time of a prompt's attention, and changed no bit where one step holds all keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


def by_rows(metadata: Any) -> Any:
    """vLLM's ``CommonAttentionMetadata`` with a request for each row; causal attention alone can be told so.

    Args:
        metadata: requests of at most ``max_query_len`` rows each, by ``query_start_loc`` [requests + 1], ``seq_lens``
            [requests] and ``block_table_tensor`` [requests, blocks].
    """
    if metadata.causal is not True or metadata.max_query_len <= 1:
        return metadata
    starts, num_requests = metadata.query_start_loc, metadata.num_reqs
    counts = starts[: num_requests + 1].diff()
    of = torch.repeat_interleave(torch.arange(num_requests), counts)
    first_seen = metadata.seq_lens[:num_requests] - counts + 1
    place = torch.arange(len(of)) - starts[:num_requests][of]
    seq_lens = (first_seen[of] + place).to(metadata.seq_lens.dtype)
    new_starts = torch.arange(len(of) + 1, dtype=starts.dtype)
    changed = {
        "num_reqs": len(of),
        "max_query_len": 1,
        "query_start_loc": new_starts,
        "query_start_loc_cpu": new_starts,
        "seq_lens": seq_lens,
        "seq_lens_cpu_upper_bound": seq_lens,
        "_seq_lens_cpu": seq_lens,
        "_num_computed_tokens_cpu": seq_lens - 1,
        "block_table_tensor": metadata.block_table_tensor[of],
    }
    known = {field.name for field in dataclasses.fields(metadata)}
    return dataclasses.replace(metadata, **{name: value for name, value in changed.items() if name in known})
