"""``tune`` on a real card: its table is used, no entry changes a bit, and a run that was killed goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from batch_invariant_ops import tiles
from batch_invariant_ops.ops import matmul
from batch_invariant_ops.proof import probe, same_bits
from batch_invariant_ops.tiles import SAFE, Tile
from batch_invariant_ops.tuning.bench import Bench
from batch_invariant_ops.tuning.measuring import Gpu
from batch_invariant_ops.tuning.search import Point, Unfit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ROOT = Path(__file__).resolve().parents[2]
N, K, LARGEST = 1024, 2048, 32
COMMAND = [
    *(sys.executable, "-m", "batch_invariant_ops", "tune", "--shapes", f"{N},{K}"),
    *("--max-tokens", str(LARGEST), "--seconds", "30"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module")
def tuned(cache):
    """The finished command, its seconds, and the table."""
    start = time.monotonic()
    done = subprocess.run(
        COMMAND, cwd=ROOT, env=os.environ | {"BATCH_INVARIANT_CACHE": str(cache)}, capture_output=True, text=True,
        timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = cache / "tables" / f"{tiles.slug(torch.cuda.get_device_name())}.json"
    return done.stdout, time.monotonic() - start, json.loads(path.read_text())


def test_a_small_shape_takes_less_than_a_minute(tuned):
    out, seconds, content = tuned
    print(out)
    assert seconds < 60
    assert content["over_fixed_tile"] < 1.0 and "all with the fixed tile's bits" in out


def test_the_table_is_used(tuned, cache, monkeypatch):
    monkeypatch.setenv("BATCH_INVARIANT_CACHE", str(cache))
    tiles.table_of.cache_clear()
    card = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    table = tiles.parse(tuned[2])
    for m in (1, 16, 17, LARGEST, 5000):
        assert tiles.choose(m, N, K, torch.bfloat16, *card) == table.tile(m, N, K)
    tiles.table_of.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_no_entry_changes_a_bit(tuned, dtype):
    x, w, _ = probe(200, 520, 1024, dtype, torch.device("cuda", 0))
    expected = matmul.gemm(x, w.t(), tile=SAFE)
    for tile in tiles.parse(tuned[2]).tiles():
        for m in (1, 17, 200):
            assert same_bits(matmul.gemm(x[:m], w.t(), tile=tile), expected[:m]), (tile, m)


def test_what_was_measured_is_not_measured_again(tuned, cache):
    again = subprocess.run(
        COMMAND, cwd=ROOT, env=os.environ | {"BATCH_INVARIANT_CACHE": str(cache)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert again.returncode == 0 and "; --fresh measures them anew" in again.stdout and "0 measured" in again.stdout


def test_ctrl_c_ends_it_soon_and_leaves_no_process(tmp_path):
    process = subprocess.Popen(
        COMMAND, cwd=ROOT, env=os.environ | {"BATCH_INVARIANT_CACHE": str(tmp_path)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline()
    assert children_of(process.pid)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in out
    assert not children_of(process.pid)


def children_of(pid):
    """The command lines of tuning's processes; each ends with its parent's id."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
            if words[-1] == str(pid) and any(word.startswith("batch_invariant_ops.tuning.") for word in words):
                found.append(words)
    return found


class TestBench:
    @pytest.fixture
    def bench(self):
        made = Bench("bfloat16")
        yield made
        made.close()

    def test_the_process_that_measures_finds_what_the_others_compiled(self, bench):
        tile, point = Tile(m=128, n=128, k=32, warps=8, stages=6, group=3), Point(N, K, 128)
        bench.shape(point)
        assert bench.point(point, [SAFE, tile], 120) == ([SAFE, tile], 0)
        folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
        before = {*folder.iterdir()}
        assert 0 < bench.measure(tile, 1) < 1e5
        # launchers are built where they are used; kernels are not
        assert not [new for new in {*folder.iterdir()} - before if [*new.glob("*.cubin")]]

    def test_one_that_does_not_fit_is_unfit_and_the_next_is_measured(self, bench):
        point = Point(N, K, 256)
        bench.shape(point)
        bench.point(point, [SAFE], 120)
        large = Tile(m=256, n=256, k=128, warps=8, stages=4)
        assert large.shared_memory() > bench.card.shared_memory
        with pytest.raises(Unfit):
            bench.measure(large, 1)
        assert bench.measure(SAFE, 3) > 0

    def test_more_work_takes_more_time(self, bench):
        bench.shape(Point(4096, 4096, 4096))
        times = []
        for m in (256, 4096):
            bench.point(Point(4096, 4096, m), [SAFE], 120)
            times.append(bench.measure(SAFE, 3))
        assert times[1] > 4 * times[0]

    def test_other_bits_would_be_seen(self):
        gpu = Gpu()
        assert gpu.shape(N, K, 8, "bfloat16") == {} and gpu.point(8) == {}
        assert gpu.time(list(astuple(SAFE)), 1)["us"] > 0
        gpu.point(8)
        gpu.reference[0, 0] += 1
        assert gpu.time(list(astuple(SAFE)), 1) == {"other": 1}
