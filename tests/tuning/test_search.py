"""The search finds the best tile of a known surface in few measurements, and never one that fails or differs."""

import random
from collections import Counter

import pytest
from imagined_card import H100, cost

from batch_invariant_ops.ops import specialised
from batch_invariant_ops.tiles import COPYING, FORMS, PLAIN, SAFE, SPECIALISED, Tile
from batch_invariant_ops.tuning.candidates import (
    ACCUMULATORS,
    COPYING_FEW,
    SPECIALISED_ACCUMULATORS,
    SPECIALISED_FEW,
    SPECIALISED_ROWS,
    Card,
    candidates,
)
from batch_invariant_ops.tuning.search import NothingRan, OtherBits, Unfit, search

SHAPES = [(6144, 4096), (4096, 14336), (128256, 4096), (60, 100), (2, 2)]
TILES = [SAFE, *candidates(64, 4096, 4096, H100)]
BEST = min(TILES, key=lambda tile: cost(tile, 64))


class TestCandidates:
    @pytest.mark.parametrize("m", [1, 2, 17, 64, 192, 8192])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_fit_the_card(self, m, shape):
        found = candidates(m, *shape, H100)
        others = [tile for tile in found if tile.form != SPECIALISED]
        assert 0 < len(others) < 60 and len(found) == len(set(found)) <= len(others) + SPECIALISED_FEW
        for tile in found:
            assert tile.shared_memory() <= H100.shared_memory
            if tile.form == SPECIALISED:
                assert tile.fed * tile.thin <= SPECIALISED_ACCUMULATORS * 32 * tile.warps
            else:
                assert tile.m * tile.n <= ACCUMULATORS * 32 * tile.warps

    def test_a_smaller_card_has_smaller_ones(self):
        small = Card("a card", (8, 6), 28, 99 * 1024)
        found = candidates(4096, 4096, 4096, small)
        assert found and all(tile.shared_memory() <= 99 * 1024 for tile in found)
        assert any(tile.shared_memory() > 99 * 1024 for tile in candidates(4096, 4096, 4096, H100))

    @pytest.mark.skipif(specialised.gluon is None, reason="this Triton has no Gluon")
    @pytest.mark.parametrize(
        "m, n, k, tile", [(1024, 1152, 896, (64, 144)), (4096, 1280, 8192, (256, 160)), (1024, 2048, 4096, (128, 128))]
    )
    def test_there_is_a_tile_for_each_multiprocessor_and_no_more(self, m, n, k, tile):
        """These were the fastest on an H200, where others left multiprocessors idle or took a second turn."""
        found = candidates(m, n, k, H100)
        first = next(number for number, tile in enumerate(found) if tile.form == SPECIALISED)
        assert (found[first].m, found[first].n) == tile
        assert first <= 4  # a search that is short of time measures the first ones alone

    def test_are_of_many_sizes(self):
        assert len({(tile.m, tile.n, tile.swap) for tile in candidates(64, 4096, 4096, H100)}) >= 6

    def test_few_rows_get_flat_tiles_and_many_get_large_ones(self):
        flat = candidates(1, 4096, 4096, H100)
        assert {tile.m for tile in flat if tile.form != SPECIALISED} == {16}
        assert {tile.m for tile in flat if tile.form == SPECIALISED} == ({8} if specialised.gluon else set())
        assert (128, 256) in {(tile.m, tile.n) for tile in candidates(8192, 28672, 4096, H100)}

    @pytest.mark.parametrize("m", [64, 192, 512, 8192])
    def test_many_rows_get_every_form(self, m):
        found = candidates(m, 28672, 4096, H100)
        special = {SPECIALISED} if m <= SPECIALISED_ROWS and specialised.gluon is not None else set()
        assert {tile.form for tile in found} == {*FORMS} - {SPECIALISED} | special
        for tile in found:
            assert tile.form in (PLAIN, SPECIALISED) or (tile.warps % 4 == 0 and tile.wide >= 64)

    @pytest.mark.parametrize("m", [1, 16, 32, 48])
    def test_few_rows_get_few_of_the_other_forms(self, m):
        found = [tile.form for tile in candidates(m, 6144, 4096, H100)]
        assert 0 < found.count(COPYING) <= COPYING_FEW
        special = found.count(SPECIALISED)
        assert 0 < special <= SPECIALISED_FEW if specialised.gluon is not None else not special
        assert {*found} - {SPECIALISED} == {PLAIN, COPYING}

    @pytest.mark.parametrize(
        "n, k, capability", [(60, 4096, (9, 0)), (4096, 1020, (9, 0)), (4096, 4096, (8, 0)), (4096, 4096, (8, 9))]
    )
    def test_where_the_copy_engine_cannot_serve_there_is_the_plain_form_alone(self, n, k, capability):
        card = Card("a card", capability, 132, 227 * 1024)
        assert {tile.form for tile in candidates(2048, n, k, card)} == {PLAIN}


class TestSearch:
    def test_finds_the_lowest_place(self):
        found = search(TILES, lambda tile, rounds: cost(tile, 64))
        assert found.best == BEST and found.times[SAFE] == 1000.0 and len(found.times) == len({*TILES})

    def test_finds_it_through_noise(self):
        noise = random.Random(0)
        for _ in range(20):
            found = search(TILES, lambda tile, rounds: cost(tile, 64) * noise.uniform(1, 1.02))
            assert cost(found.best, 64) < 1.03 * cost(BEST, 64)

    def test_most_effort_is_for_the_best(self):
        rounds = Counter()
        search(TILES, lambda tile, number: rounds.update({tile: number}) or cost(tile, 64))
        assert rounds[BEST] == 1 + 3 + 9 and rounds[SAFE] == 1
        assert sum(rounds.values()) < 3 * len(TILES) + 9

    def test_the_best_are_timed_in_turns(self):
        order = []
        search(TILES, lambda tile, rounds: order.append(tile) or cost(tile, 64))
        assert order[-4:] == order[-8:-4] == order[-12:-8] and len({*order[-4:]}) == 4

    @pytest.mark.parametrize("rung", [1, 3], ids=["at first", "later"])
    def test_what_fails_is_skipped_counted_and_never_wins(self, rung):
        def measure(tile, rounds):
            if tile == BEST and rounds >= rung:
                raise Unfit("too large")
            return cost(tile, 64)

        found = search(TILES, measure)
        assert found.skipped == 1 and BEST not in found.times
        assert found.best == min({*TILES} - {BEST}, key=lambda tile: cost(tile, 64))

    def test_other_bits_end_it(self):
        def measure(tile, rounds):
            if tile == BEST:
                raise OtherBits(str(tile))
            return cost(tile, 64)

        with pytest.raises(OtherBits, match="Tile"):
            search(TILES, measure)

    def test_nothing_runs(self):
        def measure(tile, rounds):
            raise Unfit("no")

        with pytest.raises(NothingRan, match=f"none of {len({*TILES})} tiles"):
            search(TILES, measure)
        with pytest.raises(NothingRan):
            search([], measure)

    def test_without_time_the_first_ones_are_measured_nevertheless(self):
        now = [0.0]

        def measure(tile, rounds):
            now[0] += 1
            return cost(tile, 64)

        found = search(TILES, measure, least=3, until=0.0, clock=lambda: now[0])
        assert {*found.times} == {*list(dict.fromkeys(TILES))[:3]}
        assert found.seconds == now[0] > 0
        now[0] = 0.0
        assert len(search(TILES, measure, least=3, until=10.0, clock=lambda: now[0]).times) == 11

    def test_tells_how_far_it_is(self):
        told = []
        search(TILES, lambda tile, rounds: cost(tile, 64), told=lambda done, total: told.append((done, total)))
        assert told[0] == (1, told[-1][1]) and told[-1][0] == told[-1][1]

    def test_a_tile_named_twice_is_measured_as_one(self):
        seen = Counter()
        search([SAFE, SAFE, Tile(16, 32, 64, 4, 2)], lambda tile, rounds: seen.update([tile]) or 1.0)
        assert seen[SAFE] == 5
