"""``python -m batch_invariant_ops tune``: what it writes and prints, and how it takes bad input, faults and Ctrl-C."""

import json
import os
from dataclasses import replace

import pytest
import torch
from imagined_card import H100, Bench

from batch_invariant_ops import certificates, cli, tiles
from batch_invariant_ops.cli import tune
from batch_invariant_ops.tuning.bench import Broken

LLAMA = {
    "model_type": "llama", "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1024,
    "vocab_size": 2048, "torch_dtype": "float16",
}  # fmt: skip
COMMAND = ["tune", "--shapes", "4096,4096", "6144,1024", "--max-tokens", "16"]


@pytest.fixture
def card(monkeypatch):
    """Has the command find that card; what it found."""
    found = []

    def use(**how):
        found.append(Bench(**how))
        monkeypatch.setattr(tune, "connect", lambda dtype: found[-1])
        return found[-1]

    return use


def table():
    return json.loads(tiles.tuned(H100.gpu).read_text())


def test_writes_a_table_that_servers_then_use(card, cache, capsys):
    bench = card()
    assert cli.main(COMMAND) == 0
    path = cache / "tables" / "nvidia-h100-80gb-hbm3.json"
    out = capsys.readouterr().out
    assert out.startswith("NVIDIA H100 80GB HBM3, driver 580.1, torch 2.11.0, triton 3.6.0\n")
    assert "N=4096 K=4096: 5 values of M, 0.01 of the fixed tile's time" in out
    assert f"{path}: 2 shapes, " in out and "all with the fixed tile's bits; 0 skipped" in out
    content = table()
    assert content["gpu"] == H100.gpu and content["driver"] == "580.1" and content["over_fixed_tile"] < 0.1
    assert content["dtype"] == "bfloat16" and len(content["date"]) == 10 and len(content["measured"]) == 10
    chosen = tiles.choose(16, 4096, 4096, torch.bfloat16, H100.gpu, (9, 0))
    assert chosen == tiles.parse(content).tile(16, 4096, 4096) != tiles.SAFE
    assert bench.closed and not list(path.parent.glob(".unfinished*"))


def test_tiles_are_kept_and_the_vendor_is_measured_anew(card, cache, capsys):
    card()
    assert cli.main([*COMMAND, "--keep-tiles"]) == 0  # the shipped ones
    tiles.table_of.cache_clear()
    card()
    assert cli.main(COMMAND) == 0
    before = table()
    tiles.table_of.cache_clear()
    bench = card()
    assert cli.main([*COMMAND, "--keep-tiles", "--fresh"]) == 0
    assert tiles.parse(table()).shapes == tiles.parse(before).shapes
    kept = {replace(tile, follows=False) for tile in tiles.parse(before).tiles()}
    assert {replace(tile, follows=False) for _, tile in bench.measured} <= kept
    assert table()["cublas"] == "130202" and any(shape["vendor"] for shape in table()["shapes"])


def test_without_a_table_no_tiles_can_be_kept(card, capsys, monkeypatch, tmp_path):
    card()
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path)
    assert cli.main([*COMMAND, "--keep-tiles"]) == 2
    assert "--keep-tiles: there is no table for NVIDIA H100 80GB HBM3" in capsys.readouterr().err


def test_each_band_is_a_line(card, cache):
    card()
    cli.main(COMMAND)
    text = tiles.tuned(H100.gpu).read_text()
    assert text.count('{"up_to"') == sum('{"up_to"' in line for line in text.splitlines()) > 2
    assert max(map(len, text.splitlines())) < 150


def test_a_file_of_ones_own(card, tmp_path, capsys):
    card()
    out = tmp_path / "new" / "nvidia-h100-80gb-hbm3.json"
    assert cli.main([*COMMAND, "--out", str(out)]) == 0
    assert tiles.parse(json.loads(out.read_text())).gpu == H100.gpu and out.with_suffix(".jsonl").exists()
    assert not tiles.tuned(H100.gpu).exists()


def test_the_second_time_nothing_is_measured_unless_it_is_to_be_forgotten(card, capsys):
    card()
    cli.main(COMMAND)
    first = table()
    again = card()
    assert cli.main(COMMAND) == 0
    assert not again.measured and table() == first
    assert "10 of 10 points are in " in capsys.readouterr().out
    fresh = card()
    assert cli.main([*COMMAND, "--fresh"]) == 0
    assert fresh.measured


def test_a_models_layers_and_type(card, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    card()
    assert cli.main(["tune", "--model", str(tmp_path), "--max-tokens", "2"]) == 0
    shapes = {(shape["n"], shape["k"]) for shape in table()["shapes"]}
    assert shapes == {(1536, 512), (512, 512), (2048, 512), (512, 1024)} and table()["dtype"] == "float16"


def test_ctrl_c_keeps_what_was_measured(card, capsys):
    left = [400]

    def stop():
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    bench = card(stop=stop)
    assert cli.main(COMMAND) == 130
    out = capsys.readouterr().out
    journal = tiles.tuned(H100.gpu).with_suffix(".jsonl")
    kept = len(journal.read_text().splitlines()) - 1
    assert 0 < kept < 10 and f"stopped: {kept} of 10 points are kept in {journal}; the same command goes on" in out
    assert bench.closed and not tiles.tuned(H100.gpu).exists()
    card()
    assert cli.main(COMMAND) == 0
    assert f"{kept} of 10 points are in {journal}" in capsys.readouterr().out


def test_a_tile_with_other_bits_is_named_and_no_table_is_written(card, capsys):
    bench = card(other=lambda tile: tile.stages == 5)
    assert cli.main(COMMAND) == 1
    error = capsys.readouterr().err
    assert error.startswith("tune: other bits, which no tile may give: Tile(m=16, ") and "stages=5" in error
    assert error.count("\n") == 1 and not tiles.tuned(H100.gpu).exists() and bench.closed


def test_a_table_of_before_stays_when_a_tile_has_other_bits(card):
    card()
    cli.main(COMMAND)
    before = table()
    card(other=lambda tile: True)
    assert cli.main([*COMMAND, "--fresh"]) == 1
    assert table() == before


def test_a_gpu_that_fails_is_one_line(card, capsys):
    def fail():
        raise Broken("the process that measures: no answer in 20 s")

    card(stop=fail)
    assert cli.main(COMMAND) == 1
    assert capsys.readouterr().err == "tune: the process that measures: no answer in 20 s; no table was written\n"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--shapes", "5,x"], "--shapes 5,x: N,K with whole numbers above 1 is needed"),
        (["--shapes", "8,4", "--max-tokens", "0"], "--max-tokens 0: a whole number above 0 is needed"),
        (["--shapes", "8,4", "--seconds", "0"], "--seconds 0: a number from 1 on is needed"),
        (["--shapes", "8,4", "--seconds", "nan"], "--seconds nan: a number"),
        (["--shapes", "8,4", "--seconds", "inf"], "--seconds inf: a number"),
        (["--shapes", "8,4", "--out", "a.txt"], "--out a.txt: the name of a file that ends in .json is needed"),
        (["--shapes", "8,4", "--out", "/proc/nowhere/a.json"], "a table cannot be kept in /proc/nowhere"),
        (["--model", "/nowhere"], "--model /nowhere: no such folder"),
        (["--shapes", "8,4", "--tensor-parallel-size", "-1"], "--tensor-parallel-size -1: a whole number above 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_two(arguments, said, card, capsys):
    bench = card()
    assert cli.main(["tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m batch_invariant_ops tune: ") and said in error and error.count("\n") == 1
    assert not bench.measured


def test_fp32_has_one_tile_and_no_table(card, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"torch_dtype": "float32"}))
    card()
    assert cli.main(["tune", "--model", str(tmp_path)]) == 2
    assert "tables are for 16-bit types, its own is float32; name a --dtype" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_said_before_the_work(card, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BATCH_INVARIANT_CACHE", str(tmp_path / "file"))
    bench = card()
    assert cli.main(COMMAND) == 2
    assert f"BATCH_INVARIANT_CACHE={tmp_path}/file: a table cannot be kept" in capsys.readouterr().err
    assert not bench.measured and bench.closed


def test_another_cards_journal_is_not_mixed_in(card, tmp_path, capsys):
    card()
    out = tmp_path / "a.json"
    assert cli.main([*COMMAND, "--out", str(out)]) == 0
    content = out.with_suffix(".jsonl").read_text().replace("580.1", "570.2", 1)
    out.with_suffix(".jsonl").write_text(content)
    bench = card()
    assert cli.main([*COMMAND, "--out", str(out)]) == 2
    assert "was measured with driver '570.2', not '580.1'; --fresh forgets it" in capsys.readouterr().err
    assert not bench.measured


def test_without_a_gpu(capsys, cache):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert cli.main(COMMAND) == 2
    error = capsys.readouterr().err
    assert "torch sees no NVIDIA GPU here" in error and error.count("\n") == 1
    assert not os.path.exists(certificates.folder()) and cache == certificates.folder()


def test_the_help_says_what_it_is_for(capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune", "--help"])
    out = capsys.readouterr().out
    assert "A table changes speed alone" in out and "--fresh" in out
