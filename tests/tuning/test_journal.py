"""The journal: a run that was killed at any byte goes on, and nothing is taken from another card or version."""

import logging
from dataclasses import replace

import pytest

from batch_invariant_ops.tiles import SAFE, Tile
from batch_invariant_ops.tuning.journal import Journal, Unusable
from batch_invariant_ops.tuning.search import Found, Point

FACTS = {"gpu": "a card", "capability": (9, 0), "triton": "3.6.0"}
TILE = Tile(m=16, n=64, k=128, warps=4, stages=5, swap=True)
POINTS = [Point(64, 128, m) for m in (1, 2, 4)]
FOUND = Found(TILE, {TILE: 10.5, SAFE: 30.25}, 2, 1.5, 0.9375)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tables" / "a-card.jsonl"


def read(path, facts=FACTS, **how):
    journal = Journal(path, facts, **how)
    journal.close()
    return journal


def written(path):
    journal = Journal(path, FACTS)
    for point in POINTS:
        journal.add(point, FOUND)
    journal.avoid(SAFE, "no answer")
    journal.close()
    return path.read_bytes()


def test_holds_what_was_added(path):
    written(path)
    journal = read(path)
    assert journal.found == dict.fromkeys(POINTS, FOUND) and journal.unfit == {SAFE: "no answer"}


def test_a_kill_at_any_byte_loses_no_whole_line(path):
    whole = written(path)
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        journal = Journal(path, FACTS)
        kept = sum(end <= size for end in ends)
        assert len(journal.found) + len(journal.unfit) == max(0, kept - 1), size
        for point in POINTS:
            if point not in journal.found:
                journal.add(point, FOUND)
        journal.close()
        assert read(path).found == dict.fromkeys(POINTS, FOUND), size


def test_a_form_is_kept(path):
    copying = replace(TILE, form="copying")
    journal = Journal(path, FACTS)
    journal.add(POINTS[0], Found(copying, {copying: 9.5, TILE: 10.5}))
    journal.close()
    assert read(path).found[POINTS[0]].best == copying != TILE


def test_a_line_that_was_cut_off_is_said(path, caplog):
    path.write_bytes(written(path)[:-5])
    read(path)
    assert [record.message for record in caplog.records] == [f"{path}: its last line is cut off, and is dropped"]
    caplog.clear()
    read(path)
    assert not caplog.records


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", "{}",
             '{"n": 64, "k": 128, "m": 1, "best": [16], "times": [], "skipped": 0, "seconds": 0}',
             '{"unfit": [1, 2], "why": ""}', "\xff\xfe"],
)  # fmt: skip
def test_a_damaged_line_is_dropped_and_said_and_the_others_hold(path, line, caplog):
    first, _, *rest = written(path).splitlines(keepends=True)
    path.write_bytes(b"".join([first, line.encode("latin-1") + b"\n", *rest]))
    with caplog.at_level(logging.WARNING):
        assert [*read(path).found] == POINTS[1:]
    assert [record.message for record in caplog.records] == [f"{path}: its line 2 cannot be read, and is dropped"]


@pytest.mark.parametrize("other", [{"gpu": "another"}, {"capability": (8, 0)}, {"triton": "3.7.0"}, {"triton": None}])
def test_another_cards_or_versions_is_not_mixed_in(path, other):
    before = written(path)
    ((name, value),) = other.items()
    with pytest.raises(Unusable, match=f"was measured with {name} .*, not .*; --fresh forgets it"):
        Journal(path, FACTS | other)
    assert path.read_bytes() == before and value != FACTS[name]
    assert not read(path, FACTS | other, fresh=True).found
    assert not read(path, FACTS | other).found


def test_a_damaged_first_line_makes_all_unusable(path):
    path.write_bytes(b"x" + written(path))
    with pytest.raises(Unusable, match="a first line that cannot be read"):
        Journal(path, FACTS)


def test_two_runs_do_not_write_at_once(path):
    first = Journal(path, FACTS)
    with pytest.raises(Unusable, match=r"is in use by another tune"):
        Journal(path, FACTS, fresh=True)
    first.add(POINTS[0], FOUND)
    first.close()
    assert read(path).found == {POINTS[0]: FOUND}
