"""FlashAttention 3 is told of lengths with which its own rules have one outcome; the rules are written here once more.

They follow ``hopper/flash_api.cpp``, ``hopper/heuristics.h`` and ``hopper/tile_size.h`` of vLLM's flash-attention at
617264c, for two-byte types and values with the head size of the keys.
"""

from types import SimpleNamespace

import pytest

from batch_invariant_ops.integrations.flash_attention import bounds, with_one_step

LONGEST = (1, 2, 3, 7, 8, 9, 16, 17, 32, 48, 49, 64, 65, 128, 192, 193, 512, 8192)
CONTEXTS = (1, 2, 63, 64, 65, 66, 67, 129, 130, 4097, 10000)
HEADS = (32, 64, 72, 80, 96, 112, 128, 160, 192, 256)
PAGES = (0, 16, 32, 64, 80, 96, 128, 144, 160, 192, 256)
WINDOWS = (-1, 0, 63, 127, 4095)


def rounded(head):
    return next(size for size in (64, 96, 128, 192, 256) if head <= size)


def tile(head, causal, local, through_pointers, one_group):
    """(rows, step) of tile_size_fwd_sm90."""
    size = rounded(head)
    if size == 64:
        if one_group:
            return 64, 192
        return 192, 128 if causal else 160 if local or through_pointers else 192
    if size == 96:
        return 192, 128 if local or through_pointers else 144
    if size == 128:
        rows, longest = (64, 176) if one_group else (128, 160)
        return rows, 128 if causal or local or through_pointers else longest
    if size == 192:
        return 128, 96 if through_pointers or local else 128
    return 128, 64 if local else 80


def step(head, page, window, ratio, longest, context):
    """The step along the keys that causal attention takes, ``ratio`` query heads a key head."""
    left = -1 if window >= context - 1 else window
    right = -1 if longest == 1 else 0
    causal = not (longest == 1 and left == right == -1 and (head <= 64 or head > 128 or not page))
    right = 0 if causal or right == 0 else right
    causal, local = left < 0 and right == 0, left >= 0
    one_group = head in (64, 128) and not local and longest * ratio <= 64
    rows, copied = tile(head, causal, local, False, one_group)
    by_copy = page and not local and page % copied == 0 and longest * ratio > rows
    return tile(head, causal, local, page and not by_copy, one_group)[1]


def steps(head, page, window, ratio, told=True):
    least_longest, least_context = bounds(head, page, window) if told else (1, 1)
    return {
        step(head, page, window, ratio, max(longest, least_longest), max(context, least_context))
        for longest in LONGEST
        for context in CONTEXTS
    }


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("page", PAGES)
def test_the_step_is_the_same_for_every_batch(head, page):
    for window in WINDOWS:
        for ratio in (1, 2, 4, 5, 7, 8, 16):
            assert len(steps(head, page, window, ratio)) == 1, (window, ratio)


@pytest.mark.parametrize(
    "head, page, window", [(64, 16, -1), (64, 16, 63), (256, 16, 63), (96, 144, -1), (128, 0, -1), (192, 128, -1)]
)
def test_without_being_told_it_is_not(head, page, window):
    assert len(steps(head, page, window, 4, told=False)) > 1


@pytest.mark.parametrize("head", [96, 128, 256])
def test_what_had_one_step_before_is_told_nothing(head):
    assert bounds(head, 16, -1) == (1, 1)
    assert all(len(steps(head, 16, -1, ratio, told=False)) == 1 for ratio in (1, 4, 8))


def attend(q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, window_size=None, block_table=None,
           scheduler_metadata=None, fa_version=2):  # fmt: skip
    """Has the names of vLLM's function, and gives back what it was called with."""
    return dict(locals())


def shaped(*shape):
    return SimpleNamespace(shape=shape)


def call(head, page, *, version=3, longest=1, context=40, window=None, plan=None):
    return {
        "q": shaped(8, 32, head), "k": shaped(100, page, 8, head), "v": None, "cu_seqlens_q": None,
        "max_seqlen_q": longest, "max_seqlen_k": context, "window_size": window, "block_table": shaped(8, 4),
        "scheduler_metadata": plan, "fa_version": version,
    }  # fmt: skip


@pytest.mark.parametrize(
    "made, longest, context, plan",
    [
        (call(64, 16, plan="ahead"), 193, 40, None),
        (call(64, 16, longest=500, plan="ahead"), 500, 40, "ahead"),
        (call(128, 16, plan="ahead"), 1, 40, "ahead"),
        (call(128, 16, window=[63, 0], plan="ahead"), 1, 65, None),
        (call(128, 16, window=[63, 0], context=900, plan="ahead"), 1, 900, "ahead"),
        (call(128, 16, window=[-1, -1]), 1, 40, None),
        (call(64, 16, version=2, window=[63, 0], plan="ahead"), 1, 40, "ahead"),
    ],
)
def test_a_call_is_told_of_lengths_beyond_the_bounds_and_of_nothing_else(made, longest, context, plan):
    told = {"max_seqlen_q": longest, "max_seqlen_k": context, "scheduler_metadata": plan}
    assert with_one_step(attend)(**made) == made | told


def test_arguments_by_position_are_seen_too():
    made = call(64, 16)
    named = {name: made.pop(name) for name in ("q", "k", "v", "max_seqlen_q")}
    assert with_one_step(attend)(*named.values(), **made)["max_seqlen_q"] == 193
