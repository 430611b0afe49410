"""A run over all points: the table is that of the surface, whatever was killed, and holds no more tiles than needed."""

import json
import math
from dataclasses import replace

import pytest
from imagined_card import H100, Bench, cost

from batch_invariant_ops import tiles
from batch_invariant_ops.tiles import NO_LIMIT, SAFE, Tile
from batch_invariant_ops.tuning import bands
from batch_invariant_ops.tuning.journal import Journal
from batch_invariant_ops.tuning.run import LAUNCHED, SIZES, Run, measurements, sizes
from batch_invariant_ops.tuning.search import Found, NothingRan, OtherBits, Point

SHAPES = [(4096, 4096), (6144, 1024)]
A, B = (Tile(m=16, n=32, k=64, warps=4, stages=stages) for stages in (2, 3))


@pytest.fixture
def run(tmp_path):
    """Makes a run with the journal in one file; the run."""
    journals = []

    def make(bench=None, shapes=SHAPES, largest=64, seconds=1e6, journal="a", **how):
        for before in journals:
            before.close()
        journals.append(Journal(tmp_path / f"{journal}.jsonl", {"gpu": H100.gpu}))
        return Run(bench or Bench(), journals[-1], shapes, largest, seconds, **how)

    yield make
    for journal in journals:
        journal.close()


def go(run, said=lambda text: None):
    run.go(lambda number, point, done, total: None, said)
    return run.table()


def test_the_table_is_the_surfaces(run):
    made = run()
    table = go(made)
    assert {*table.shapes} == {*SHAPES} and table.gpu == H100.gpu and table.capability == (9, 0)
    for n, k in SHAPES:
        for m in sizes(n, 64):
            found = made.journal.found[Point(n, k, m)]
            assert cost(table.tile(m, n, k), m) <= 1.02 * cost(found.best, m)
            assert cost(found.best, m) == min(cost(tile, m) for tile in found.times)
    assert table.tile(8192, *SHAPES[0]) == table.tile(64, *SHAPES[0])


def test_the_fastest_tiles_are_tried_with_either_way_of_launching(run):
    made = run()
    table = go(made)
    for point, found in made.journal.found.items():
        either = [tile for tile in found.times if replace(tile, follows=not tile.follows) in found.times]
        assert len(either) >= 2 * LAUNCHED
        assert {*found.times} >= {found.best, replace(found.best, follows=not found.best.follows)}
        assert found.best.follows == (point.m <= 16)
    assert all(table.tile(1, *shape).follows and not table.tile(64, *shape).follows for shape in SHAPES)


@pytest.mark.parametrize("name", [tiles.slug(H100.gpu), "sm_90"])
def test_the_tile_that_would_run_untuned_is_among_the_tried(run, tmp_path, monkeypatch, name):
    odd = Tile(m=16, n=16, k=16, warps=1, stages=7, group=5)
    table = tiles.Table((9, 0), None, ((NO_LIMIT, odd),), {})
    (tmp_path / f"{name}.json").write_text(json.dumps(tiles.content_of(table)))
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path)
    made = run()
    go(made)
    assert all(odd in made.journal.found[point].times for point in made.points)


def test_where_one_tile_is_best_everywhere_there_is_one_band(run, monkeypatch):
    table = go(run())
    monkeypatch.setattr("imagined_card.cost", lambda tile, m: 1.0 if tile == SAFE else 2.0)
    assert go(run(shapes=[(512, 512)])).shapes[512, 512] == ((NO_LIMIT, SAFE),)
    assert min(len(rows) for rows in table.shapes.values()) > 1


def test_each_missing_point_is_measured_once_and_each_shape_is_made_once(run):
    made = run()
    go(made)
    assert made.bench.shapes == [Point(n, k, 64) for n, k in SHAPES]
    seen = list(dict.fromkeys(point for point, _ in made.bench.measured))
    assert seen == made.points == made.missing
    again = run()
    assert go(again) == made.table() and not again.bench.measured and not again.missing


@pytest.mark.parametrize("how", [KeyboardInterrupt, OtherBits])
@pytest.mark.parametrize("after", [0, 1, 300, 800])
def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_table(run, tmp_path, how, after):
    whole = go(run())
    (tmp_path / "a.jsonl").unlink()
    left = [after]

    def stop():
        left[0] -= 1
        if left[0] < 0:
            raise how("here")

    first = run(Bench(stop=stop))
    with pytest.raises(how):
        go(first)
    done = len(first.journal.found)
    assert done < len(first.points) and (done > 0) == (after >= 300)
    second = run()
    assert len(second.missing) == len(first.points) - done
    assert go(second) == whole


def test_neighbours_winners_come_before_others(run):
    made = run(shapes=[(4096, 4096)])
    go(made)
    for m, before in ((2, 1), (64, 48)):
        at = [tile for point, tile in made.bench.measured if point.m == m]
        times = made.journal.found[Point(4096, 4096, before)].times
        assert at[0] == SAFE and at[1:4] == sorted(times, key=lambda tile: times[tile])[:3]


def test_what_fails_is_in_no_table_and_is_counted(run):
    made = run(Bench(unfit=lambda tile, m: tile.n == 64 and tile != SAFE))
    assert not [tile for bands in go(made).shapes.values() for _, tile in bands if tile.n == 64]
    assert all(found.skipped for found in made.journal.found.values())


def test_a_tile_that_hung_before_is_not_asked_for_again(run):
    made = run()
    made.bench.avoid(A, "no answer")
    assert run().bench.unfit == {A: "no answer"}


def test_with_little_time_each_point_gets_its_share(run):
    now = [0.0]

    def tick():
        now[0] += 0.1

    made = run(Bench(stop=tick), seconds=30.0, clock=lambda: now[0])
    go(made)
    assert {*made.journal.found} == {*made.points}
    counts = [len(found.times) for found in made.journal.found.values()]
    assert min(counts) >= 2 and max(counts) < 40 and now[0] < 90


def test_what_does_not_fit_into_memory_is_left_out_and_said(run):
    said = []
    made = run(Bench(room=32), shapes=[(4096, 4096)])
    go(made, said.append)
    assert [point.m for point in made.journal.found] == [m for m in SIZES if m <= 32]
    assert said[0] == "N=4096 K=4096: too little memory for M = 64, which is left out" and len(said) == 3
    with pytest.raises(NothingRan):
        (none := run(Bench(room=0), shapes=[(8, 8)])).journal.found.clear()
        go(none)


def test_shapes_measured_before_stay_unless_they_are_unfinished(run):
    go(run(shapes=[(512, 512)]))
    made = run()
    made.journal.add(Point(1024, 1024, 1), Found(A, {A: 1.0}))
    assert {*go(made).shapes} == {*SHAPES, (512, 512)}


def test_a_table_survives_being_written_and_is_chosen(run):
    import torch

    table = go(run())
    assert all(table.faster.values())
    text = json.dumps(tiles.content_of(table, measured=[]))
    path = tiles.tuned(H100.gpu)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert tiles.parse(json.loads(text)) == table
    for m in (1, 3, 64, 500):
        tile = tiles.choose(m, *SHAPES[0], torch.bfloat16, H100.gpu, (9, 0))
        assert tile == table.tile(m, *SHAPES[0])
    assert tiles.choose(1, *SHAPES[0], torch.bfloat16, "another", (9, 0)) != table.tile(1, *SHAPES[0])
    assert tiles.faster(*SHAPES[0], torch.bfloat16, H100.gpu, (9, 0)) == table.faster[SHAPES[0]]
    assert tiles.faster(*SHAPES[0], torch.float32, H100.gpu, (9, 0)) == ()
    assert tiles.faster(8, 8, torch.bfloat16, H100.gpu, (9, 0)) == ()
    asked = *SHAPES[0], torch.bfloat16, H100.gpu, (9, 0)
    measured = tuple((m, int(m == 8)) for m in SIZES if m <= 64)
    assert tiles.ranks(*asked, "130202") == measured == table.ranks[SHAPES[0]]
    assert tiles.ranks(*asked, "130300") == ()
    assert tiles.ranks(*SHAPES[0], torch.float32, H100.gpu, (9, 0), "130202") == ()


def test_with_tiles_that_are_kept_only_those_are_measured_and_at_the_steps_of_prompts_too(run):
    table = go(run(largest=1024))
    made = run(kept=table, journal="kept", largest=1024)
    again = go(made)
    assert {replace(tile, follows=False) for _, tile in made.bench.measured} <= {
        replace(tile, follows=False) for tile in table.tiles()
    }
    assert again.faster == table.faster
    between = {m for m in tiles.STEPS if m <= 1024} - {*SIZES}
    for shape in SHAPES:
        assert dict(again.ranks[shape]).keys() == dict(table.ranks[shape]).keys() | between
        assert dict(table.ranks[shape]).items() <= dict(again.ranks[shape]).items()
    assert all(again.tile(m, *shape) == table.tile(m, *shape) for shape in SHAPES for m in SIZES)


class TestSizes:
    def test_an_8bs(self):
        assert sizes(4096, 8192) == [*SIZES] == sizes(128256, 8192) and sizes(4096, 100) == [
            m for m in SIZES if m < 100
        ]

    def test_no_result_is_out_of_proportion(self):
        assert max(sizes(300000, 8192)) == 2048 and sizes(2**31, 8192) == [1]


class TestBands:
    def test_equal_neighbours_are_merged_and_the_last_has_no_end(self):
        costs = {1: {A: 1.0, B: 2.0}, 2: {A: 1.0, B: 2.0}, 4: {A: 2.0, B: 1.0}, 8: {B: 1.0}}
        assert bands.bands(costs) == ((2, A), (NO_LIMIT, B))

    def test_a_neighbours_tile_that_is_nearly_as_fast_is_kept(self):
        assert bands.bands({1: {A: 1.0, B: 1.5}, 2: {A: 1.019, B: 1.0}}) == ((NO_LIMIT, A),)

    def test_one_that_is_slower_is_not(self):
        assert bands.bands({1: {A: 1.0, B: 1.5}, 2: {A: 1.021, B: 1.0}}) == ((1, A), (NO_LIMIT, B))

    def test_one_that_was_not_measured_there_is_not(self):
        assert bands.bands({1: {A: 1.0}, 2: {B: 1.0}, 4: {A: 1.0, B: 1.5}}) == ((1, A), (2, B), (NO_LIMIT, A))

    def test_ours_is_chosen_where_it_is_worth_it(self):
        over = {1: 0.9, 2: 0.98, 4: 0.99, 8: None, 16: 0.5, 32: 1.5}
        found = {Point(8, 8, m): Found(A, {A: 1.0}, over_vendor=ratio) for m, ratio in over.items()}
        assert bands.table(found, H100).faster == {(8, 8): ((1, 2), (9, 16))}

    @pytest.mark.parametrize(
        "won, ranges",
        [
            ({1: True, 2: True, 4: False, 8: True}, ((1, 2), (5, NO_LIMIT))),
            ({1: False, 2: True, 4: True}, ((2, NO_LIMIT),)),
            ({1: True, 2: False}, ((1, 1),)),
            ({1: False}, ()),
        ],
    )
    def test_rows_between_two_measured_numbers_go_by_the_larger(self, won, ranges):
        assert bands.ranges(won) == ranges

    def test_over_the_fixed_tile(self):
        found = [Found(A, {A: 10.0, SAFE: 20.0}), Found(A, {A: 10.0, SAFE: 80.0}), Found(A, {A: 1.0})]
        assert math.isclose(bands.over_fixed(found), 0.25) and bands.over_fixed(found[2:]) is None
        (line,) = measurements({Point(8, 4, 1): found[0]})
        assert line == {"n": 8, "k": 4, "m": 1, "us": 10.0, "fixed_us": 20.0, "over_vendor": None, "vendor": 0}
