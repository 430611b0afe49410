"""Tiles are speed alone: every card gets one, from the nearest sound table, and is told if that is a guess."""

import json
import logging
from dataclasses import replace

import pytest
import torch

from batch_invariant_ops import tiles
from batch_invariant_ops.tiles import NO_LIMIT, SAFE, Table, Tile

SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
NAMELESS = "NVIDIA H1"
"""A card for whose name no table is shipped."""
TABLES = sorted(tiles.SHIPPED.glob("*.json"))
OTHER = Tile(m=16, n=32, k=64, warps=4, stages=2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCH_INVARIANT_CACHE", str(tmp_path))
    tiles.table_of.cache_clear()
    yield tmp_path
    tiles.table_of.cache_clear()


def content(**changes):
    table = Table((9, 0), "NVIDIA H100 80GB HBM3", ((64, OTHER), (NO_LIMIT, SAFE)), {(48, 64): ((NO_LIMIT, OTHER),)})
    return tiles.content_of(table) | changes


def keep(gpu, text):
    path = tiles.tuned(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_shipped_table_is_sound_and_fits_its_card(path):
    table = tiles.read(path)
    assert path.stem in (f"sm_{table.capability[0]}{table.capability[1]}", tiles.slug(table.gpu or ""))
    for tile in table.tiles():
        assert tile.shared_memory() <= SHARED_MEMORY[table.capability] * 1024, tile


NO_RANGES = [[[0, 4]], [[4, 2]], [[1, 4], [3, 8]], [[1, 4.5]], [[1]], [[1, None], [3, 4]], 5]
NO_RANKS = [[[0, -1]], [[4, 0], [2, 1]], [[4, 0], [4, 1]], [[1, 1.5]], [[4, 1], [None, 0]], 5]


@pytest.mark.parametrize(
    "name, said", [*(("faster", said) for said in NO_RANGES), *(("vendor", said) for said in NO_RANKS)]
)
def test_where_ours_is_faster_and_which_of_the_vendors_must_ascend(name, said, caplog):
    table = content()
    table["shapes"][0][name] = said
    keep(NAMELESS, json.dumps(table))
    assert tiles.table_of(NAMELESS, (9, 0)).gpu != "NVIDIA H100 80GB HBM3"
    assert "is ignored" in caplog.text


def test_a_table_of_before_says_nothing_of_the_vendor():
    said = content()
    for name in ("faster", "vendor"):
        said["shapes"][0].pop(name, None)
    said.pop("cublas", None)
    table = tiles.parse(said)
    assert (table.faster, table.ranks, table.cublas) == ({(48, 64): ()}, {(48, 64): ()}, None)


def test_the_usual_cards_have_one():
    assert {tiles.read(path).capability for path in TABLES} == set(SHARED_MEMORY)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_a_card_that_was_not_measured_runs_its_classs_tiles_and_says_so_once(capability, caplog):
    caplog.set_level(logging.INFO)
    chosen = {tiles.choose(m, 8, 8, torch.bfloat16, "a new card", capability) for m in (1, 64, 8192)}
    assert len(chosen) > 1
    major, minor = capability
    assert [r.message for r in caplog.records] == [
        f"tiles for compute capability {major}.{minor} are not measured: correct, maybe slower"
    ]


@pytest.mark.parametrize("capability", [(7, 5), (8, 7), (10, 3), (13, 0)])
def test_a_card_without_a_table_runs_the_safe_tile_and_says_so_once(capability, caplog):
    caplog.set_level(logging.INFO)
    chosen = {tiles.choose(m, 8, 8, torch.bfloat16, "a new card", capability) for m in (1, 64, 8192)}
    assert chosen == {SAFE}
    assert [r.message for r in caplog.records] == [
        f"no tile table for compute capability {capability[0]}.{capability[1]}: one fixed tile, correct but slower"
    ]


def test_a_card_that_was_tuned_here_runs_its_own_and_says_nothing(caplog):
    caplog.set_level(logging.INFO)
    keep("NVIDIA H100 80GB HBM3", json.dumps(content()))

    def choose(m, n, k):
        return tiles.choose(m, n, k, torch.bfloat16, "NVIDIA H100 80GB HBM3", (9, 0))

    assert [choose(1, 8, 8), choose(65, 48, 64)] == [OTHER, OTHER]
    assert not caplog.records


def test_anothers_table_is_not_taken():
    keep("NVIDIA H100 80GB HBM3", json.dumps(content()))
    assert tiles.choose(1, 8, 8, torch.bfloat16, "NVIDIA H200", (9, 0)) != OTHER


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'format'"),
        (json.dumps(content(format=2)), "its format is 2, not 1"),
        (json.dumps(content(capability=[8, 0])), r"it is for compute capability (8, 0), not (9, 0)"),
        (json.dumps(content(bands=[])), "its bands end at []"),
        (json.dumps(content(bands=content()["bands"][:1])), "its bands end at [64]"),
        (json.dumps(content(bands=content()["bands"][::-1])), "its bands end at"),
        (json.dumps(content()).replace('"m": 16', '"m": 48'), "a tile's m is 48: a power of two from 16 to 256"),
        (json.dumps(content()).replace('"k": 64', '"k": "64"'), "a tile's k is '64': a power of two"),
        (json.dumps(content()).replace('"stages": 2', '"stages": 0'), "a tile's stages is 0"),
        (json.dumps(content()).replace('"swap": false', '"swap": 1'), "a tile's swap is 1: true or false"),
        (json.dumps(content()).replace('"plain"', '"fast"'), "a tile's form is 'fast': one of plain, copying, "),
        (json.dumps(content()).replace('"plain"', "null"), "a tile's form is None: one of plain, copying, "),
    ],
)
def test_a_damaged_table_is_ignored_with_one_line(text, said, caplog):
    path = keep(NAMELESS, text)
    tile = tiles.choose(1, 8, 8, torch.bfloat16, NAMELESS, (9, 0))
    assert tile == tiles.table_of("NVIDIA H200", (9, 0)).tile(1, 8, 8)
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert str(path) in record.message and said in record.message


def test_a_table_survives_being_written_and_read():
    table = tiles.parse(content())
    assert tiles.parse(json.loads(json.dumps(tiles.content_of(table, torch="2.11", measured="a day")))) == table


def test_a_table_of_before_there_were_forms_is_read_as_plain():
    before = json.loads(json.dumps(content()).replace(', "form": "plain"', ""))
    assert '"form"' not in json.dumps(before) and tiles.parse(before) == tiles.parse(content())


@pytest.mark.parametrize("form", tiles.FORMS)
def test_a_form_survives_being_written_and_read(form):
    wide = {"n": 64} if form == tiles.SPECIALISED else {}
    table = Table((9, 0), "a card", ((NO_LIMIT, replace(OTHER, form=form, **wide)),), {})
    assert tiles.parse(json.loads(json.dumps(tiles.content_of(table)))) == table


def test_a_tile_that_stays_counts_its_result_and_leaves_room_for_as_many_as_fit():
    wide, square = Tile(m=128, n=256, k=64, warps=8, stages=3), Tile(m=128, n=128, k=64, warps=4, stages=2)
    plain, copying, staying = (replace(wide, form=form) for form in (tiles.PLAIN, tiles.COPYING, tiles.STAYING))
    assert plain.shared_memory() < copying.shared_memory() < staying.shared_memory()
    assert (copying.parts, staying.parts, replace(staying, swap=True, m=64).parts) == (1, 2, 1)
    assert staying.residents == 1 and replace(square, form=tiles.STAYING).residents == 2


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"n": 256, "warps": 4},
            "a specialised tile of 256 rows for wgmma has 4 warps and 4 stages: a warp for 16 or 32 rows",
        ),
        ({"warps": 8}, "a specialised tile of 32 rows for wgmma has 8 warps"),
        ({"stages": 1}, "4 warps and 1 stages"),
        ({"stages": 33}, "a tile's stages is 33: a whole number from 1 to 32"),
        ({"k": 32}, "a tile's k is 32: a power of two from 64 to 512"),
        ({"m": 4}, "a tile's m is 4: a power of two, or a multiple of 8 that is the sum of two, from 8 to 256"),
        ({"m": 20}, "a tile's m is 20: a power of two, or a multiple of 8"),
        ({"m": 56}, "a tile's m is 56: a power of two, or a multiple of 8"),
        ({"n": 56}, "a tile's n is 56: a power of two, or a multiple of 8 that is the sum of two, from 8 to 256"),
        ({"n": 80}, "a tile's n is 80: a power of two from 8 to 256"),
        ({"form": "copying"}, "a tile's m is 8: a power of two from 16 to 256"),
    ],
)
def test_a_specialised_tile_has_bounds_of_its_own(changes, said):
    narrow = Tile(m=8, n=32, k=512, warps=4, stages=4, swap=True, form=tiles.SPECIALISED)
    assert (narrow.wide, narrow.thin, narrow.fed, narrow.behind) == (32, 8, 64, 1)
    with pytest.raises(ValueError, match=said):
        replace(narrow, **changes)


@pytest.mark.parametrize("thin, parts", [(8, (8,)), (24, (16, 8)), (128, (128,)), (192, (128, 64))])
def test_a_specialised_tiles_thin_side_is_made_of_one_or_two_powers_of_two(thin, parts):
    tile = Tile(m=thin, n=64, k=64, warps=4, stages=2, swap=True, form=tiles.SPECIALISED)
    assert tile.thin_parts == replace(tile, m=64, n=thin, swap=False).thin_parts == parts


@pytest.mark.parametrize("wide, parts, behind", [(40, (32, 8), 1), (24, (16, 8), 2), (32, (32,), 1), (128, (128,), 0)])
def test_a_narrow_ones_wide_side_too(wide, parts, behind):
    tile = Tile(m=wide, n=32, k=64, warps=max(4, wide // 16), stages=4, form=tiles.SPECIALISED)
    assert (tile.wide_parts, tile.behind) == (parts, behind)
    assert tile.wide * tile.k * tile.behind >= (tile.fed - tile.wide) * tiles.LINE


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("wide, thin, k", [(16, 8, 64), (64, 32, 128), (128, 192, 64), (128, 256, 512), (256, 160, 64)])
def test_a_specialised_tile_has_a_copying_one_for_where_it_does_not_serve(swap, wide, thin, k):
    m, n = (thin, wide) if swap else (wide, thin)
    tile = Tile(m, n, k, max(4, wide // 16), 2, swap=swap, form=tiles.SPECIALISED)
    general = tile.general
    assert (general.form, general.swap, general.general) == (tiles.COPYING, swap, general)
    assert general.wide == tile.fed and general.stages >= 2
    assert general.m * general.n <= 128 * 32 * general.warps
    assert general.shared_memory() <= SHARED_MEMORY[9, 0] * 1024


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_fp32_runs_one_tile_where_no_others_bits_were_seen(capability):
    assert {tiles.choose(m, 8, 8, torch.float32, "a card", capability) for m in (1, 64, 8192)} == {tiles.FP32}


@pytest.mark.parametrize("num_rows, n, m_and_n", [(1, 4096, (16, 32)), (64, 4096, (16, 128)), (2048, 4096, (128, 256))])
def test_on_hopper_it_runs_the_one_that_took_least_time(num_rows, n, m_and_n):
    tile = tiles.choose(num_rows, n, 4096, torch.float32, "NVIDIA H200", (9, 0))
    assert (tile.m, tile.n) == m_and_n
    assert tile in {pace.tile for pace in tiles.HOPPER_FP32}


def test_a_round_is_of_as_many_programs_as_run_at_once():
    pace = tiles.Pace(Tile(64, 128, 32, 4, 2), together=2, us=10)
    assert [pace.time(m, 128 * 132) for m in (1, 64, 128, 129, 256, 257)] == [10, 10, 10, 20, 20, 30]


@pytest.mark.parametrize(
    "gpu, expected",
    [("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("../../etc/passwd", "etc-passwd"), ("", "gpu")],
)
def test_a_cards_name_makes_a_files_name(gpu, expected):
    assert tiles.slug(gpu) == expected and tiles.tuned(gpu).name == f"{expected}.json"


def test_a_shape_that_was_not_measured_goes_by_the_nearest_that_was():
    first, second, third = (Tile(m=16, n=32, k=64, warps=4, stages=stages) for stages in (2, 3, 4))
    table = Table((9, 0), "a card", ((NO_LIMIT, SAFE),), {
        (1024, 1024): ((NO_LIMIT, first),),
        (4096, 4096): ((8, second), (NO_LIMIT, SAFE)),
        (4096, 256): ((NO_LIMIT, third),),
    })  # fmt: skip
    assert [table.tile(1, *shape) for shape in ((512, 1024), (5000, 3000), (5000, 300))] == [first, second, third]
    assert table.tile(9, 5000, 3000) == SAFE and table.nearest(4096, 4096) == (4096, 4096)
    # N counts twice as much as K: of (1300, 4096), the one with near the same N and a quarter of K is the nearer
    assert table.nearest(1300, 4096) == (1024, 1024) and table.nearest(4096, 1000) == (4096, 256)


def test_a_table_without_shapes_has_its_bands_for_all():
    table = Table((8, 0), None, ((64, OTHER), (NO_LIMIT, SAFE)), {})
    assert [table.tile(m, 8, 8) for m in (1, 64, 65)] == [OTHER, OTHER, SAFE]


def test_a_table_on_another_cards_tiles_knows_nothing_of_its_vendor():
    path = tiles.SHIPPED / "sm_90.json"
    table, base = tiles.read(path), tiles.read(tiles.SHIPPED / "nvidia-h200.json")
    assert (table.gpu, table.faster) == (None, {}) and table.shapes == base.shapes and any(base.faster.values())


@pytest.mark.parametrize("gpu", ["NVIDIA H200", NAMELESS])
def test_a_table_adds_its_shapes_to_its_base(gpu):
    base = tiles.read(tiles.SHIPPED / "nvidia-h200.json")
    shape = next(iter(base.shapes))
    said = content(gpu=gpu, base="nvidia-h200")
    said["shapes"] += [{"n": shape[0], "k": shape[1], "faster": [[5, 6]], "bands": said["shapes"][0]["bands"]}]
    table = tiles.read(keep(gpu, json.dumps(said)))
    added = {(48, 64): ((NO_LIMIT, OTHER),), shape: ((NO_LIMIT, OTHER),)}
    assert table.gpu == gpu and table.shapes == base.shapes | added and table.shapes != base.shapes
    own = {(48, 64): (), shape: ((5, 6),)}
    assert table.faster == (base.faster | own if gpu == base.gpu else own)


@pytest.mark.parametrize("cublas, kept", [("130202", True), ("130300", False)])
def test_a_table_adds_its_vendors_kernels_to_its_bases_of_the_same_version(cublas, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path)
    base, own = content(cublas="130202"), content(cublas=cublas, base="nvidia-h100-80gb-hbm3")
    base["shapes"][0] |= {"vendor": [[4, 1], [8, 0]]}
    own["shapes"][0] |= {"n": 8, "vendor": [[8, 2]]}
    tiles.shipped("nvidia-h100-80gb-hbm3").write_text(json.dumps(base))
    table = tiles.read(keep(NAMELESS, json.dumps(own)))
    theirs = {(48, 64): ((4, 1), (8, 0))} if kept else {}
    assert table.ranks == theirs | {(8, 64): ((8, 2),)} and table.cublas == cublas
