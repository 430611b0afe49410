"""Tiles are speed alone: every card gets one, and a card without a table is told so."""

import logging

import pytest
import torch

from batch_invariant_ops import tiles


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0)])
def test_a_card_without_a_table_runs_the_safe_tile_and_says_so_once(capability, caplog):
    tiles._table.cache_clear()
    caplog.set_level(logging.INFO)
    chosen = {tiles.choose(m, torch.bfloat16, capability) for m in (1, 64, 8192)}
    assert chosen == {tiles.SAFE}
    assert [r.message for r in caplog.records] == [
        f"no tile table for compute capability {capability[0]}.{capability[1]}: one fixed tile, correct but slower"
    ]


@pytest.mark.parametrize("capability", tiles.TABLES)
def test_a_table_has_a_tile_for_every_m(capability):
    bounds = [largest for largest, _ in tiles.TABLES[capability]]
    assert bounds == sorted(bounds) and bounds[-1] >= 2**31
    assert tiles.choose(1, torch.bfloat16, capability) == tiles.TABLES[capability][0][1]


def test_fp32_runs_one_tile_everywhere():
    assert {tiles.choose(m, torch.float32, (9, 0)) for m in (1, 64, 8192)} == {tiles.FP32}
