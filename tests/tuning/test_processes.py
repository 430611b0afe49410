"""Tuning's processes: kernels are compiled for a card that is not here, and what hangs or crashes costs one tile."""

import os
import sys
from dataclasses import astuple, replace

import pytest
import torch

from batch_invariant_ops.ops import matmul, specialised
from batch_invariant_ops.tiles import COPYING, FLATTENED, PLAIN, SAFE, SPECIALISED, STAYING, Tile
from batch_invariant_ops.tuning import bench as benches
from batch_invariant_ops.tuning.bench import Bench, Broken, OutOfMemory
from batch_invariant_ops.tuning.candidates import Card
from batch_invariant_ops.tuning.child import Child, Gone
from batch_invariant_ops.tuning.pool import Pool
from batch_invariant_ops.tuning.search import OtherBits, Point, Unfit

H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 227 * 1024)
SMALL = Tile(m=16, n=64, k=64, warps=4, stages=3, swap=True)
WIDE = Tile(m=128, n=256, k=64, warps=8, stages=3)
BROKEN = Tile(m=256, n=256, k=64, warps=16, stages=2)  # its registers do not suffice
HANGS = Tile(m=16, n=16, k=64, warps=1, stages=2)
POINT = Point(64, 1024, 8)
CHILD = """
import os, signal, sys
from batch_invariant_ops.tuning.child import serve
def answer(question):
    {body}
serve(answer)
"""
CARD = {"gpu": "a card", "capability": [9, 0], "multiprocessors": 132, "shared_memory": 232448}
MEASURING = f"""
    do, tile = question["do"], question.get("tile", [0])
    print("noise of a compiler")
    if do == "time" and "there" not in globals(): return {{"unfit": "it is at no point"}}
    if isinstance(tile, int): return (eval(os.environ["VENDOR"]) * 8)[tile]
    if do == "card": return {CARD!r}
    if do == "shape": return {{"memory": True}} if question["m"] > 100 else {{}}
    if do == "point": globals()["there"] = True; return {{}}
    if tile[1] == 16: signal.pause()
    if tile[1] == 32: os._exit(7)
    if tile[1] == 128: return {{"other": 3}}
    if tile[1] == 256: return {{"unfit": "too large"}}
    if tile[2] == 256: return {{"crash": "an illegal access"}}
    return {{"us": 10.0 + question["rounds"]}}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module that a child runs, of its ``answer``'s body; its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(body, name="child_of_a_test"):
        (tmp_path / f"{name}.py").write_text(CHILD.format(body=body))
        return name

    return make


@pytest.fixture
def children():
    made = []
    yield made
    for child in made:
        child.kill()


SPECIAL = [
    Tile(m=8, n=32, k=256, warps=4, stages=10, swap=True, form=SPECIALISED),
    Tile(m=64, n=32, k=128, warps=4, stages=9, form=SPECIALISED),
    Tile(m=32, n=128, k=64, warps=8, stages=8, swap=True, form=SPECIALISED),
    Tile(m=32, n=40, k=128, warps=4, stages=8, form=SPECIALISED),
    Tile(m=192, n=128, k=64, warps=8, stages=5, swap=True, form=SPECIALISED),
    Tile(m=64, n=144, k=128, warps=4, stages=4, form=SPECIALISED),
    Tile(m=256, n=160, k=64, warps=8, stages=4, form=SPECIALISED),
]
needs_triton = pytest.mark.skipif(matmul.triton is None or sys.platform != "linux", reason="needs Triton")


@pytest.fixture(scope="module")
def compiled():
    child = Child("batch_invariant_ops.tuning.compiling")

    def ask(tile, n=64, k=1024, capability=(9, 0)):
        question = {"m": 8, "n": n, "k": k, "dtype": "bfloat16", "capability": capability}
        return child.ask(300, tile=list(astuple(tile)), **question)

    yield ask
    child.kill()


@needs_triton
class TestCompiling:
    def test_the_kernels_reads_are_pipelined(self, compiled):
        for tile in (SMALL, Tile(m=128, n=128, k=64, warps=4, stages=4)):
            assert compiled(tile) == {"shared": tile.shared_memory()}

    @pytest.mark.parametrize("form", [COPYING, STAYING, FLATTENED])
    def test_the_other_forms_need_no_more_than_they_say(self, compiled, form):
        for tile in (WIDE, Tile(m=64, n=256, k=64, warps=8, stages=4), Tile(16, 64, 128, 4, 4, swap=True)):
            tile = replace(tile, form=form)
            pipelined = (tile.m + tile.n) * tile.k * 2 * tile.stages
            assert pipelined < compiled(tile)["shared"] <= tile.shared_memory(), tile

    @pytest.mark.skipif(specialised.gluon is None, reason="this Triton has no Gluon")
    @pytest.mark.parametrize("tile", SPECIAL, ids=str)
    def test_a_specialised_one_needs_no_more_than_it_says(self, compiled, tile):
        pipelined = (tile.m + tile.n) * tile.k * 2 * tile.stages
        if tile.fed == tile.wide or specialised.narrow:
            assert pipelined < compiled(tile)["shared"] <= tile.shared_memory()
        assert compiled(tile, capability=(10, 0)) == compiled(tile.general, capability=(10, 0))
        assert compiled(tile, n=60) == compiled(replace(tile.general, form=PLAIN), n=60)

    @pytest.mark.parametrize("question", [{"n": 60}, {"k": 1020}, {"capability": (8, 0)}], ids=str)
    def test_where_the_copy_engine_cannot_serve_the_plain_form_is_compiled(self, compiled, question):
        assert compiled(replace(SMALL, form=COPYING), **question) == compiled(SMALL, **question)

    def test_rows_of_unknown_alignment_would_not_be(self, compiled):
        assert compiled(SMALL, k=1023)["shared"] < SMALL.shared_memory()

    def test_another_card(self, compiled):
        assert "shared" in compiled(SAFE, capability=(8, 0))

    def test_what_does_not_compile_has_a_reason_and_the_next_one_compiles(self, compiled):
        assert "Error" in compiled(BROKEN)["error"]
        assert "shared" in compiled(SMALL)


@needs_triton
def test_the_number_of_rows_does_not_compile_anew():
    """M, and the stride that follows from it, are all that two calls with one weight differ in."""
    seen = []
    for m in (1, 7, 8, 16, 1000):
        x, w = (torch.empty(size, 1000, dtype=torch.bfloat16, device="meta") for size in (m, 64))
        _, _, operands, _ = matmul._call(x[None], w.t()[None], None, x.new_empty(1, m, 64), SAFE)
        seen.append([value for value in operands if isinstance(value, int)])
    without_rows = {tuple(values[1:]) for values in seen}
    assert len(without_rows) == 1 and len({values[0] for values in seen}) == 5
    _, _, operands, _ = matmul._call(x.expand(2, -1, -1), w.t().expand(2, -1, -1), None, x.new_empty(2, m, 64), SAFE)
    assert [value for value in operands if isinstance(value, int)][-3:] == [64 * m, 64, 1]


@needs_triton
def test_nothing_of_a_shape_compiles_a_described_kernel_anew():
    assert matmul._copying_kernel.do_not_specialize == ["M", "N", "K"]
    if specialised.gluon is not None:
        assert specialised._specialised_kernel.do_not_specialize == ["M", "N", "steps", "wide_tiles"]


class TestChild:
    def test_answers_in_turn_whatever_is_printed_beside(self, module, children):
        children.append(Child(module("print('noise'); os.write(1, b'more'); return {'twice': 2 * question['x']}")))
        assert [children[0].ask(60, x=x)["twice"] for x in (1, 2)] == [2, 4]

    def test_one_that_hangs_is_killed(self, module, children):
        children.append(Child(module("signal.pause()")))
        with pytest.raises(Gone, match=r"no answer in 0\.2 s"):
            children[0].ask(0.2)
        assert children[0].ended and children[0]._process.poll() is not None

    def test_one_that_ends_says_its_last_words(self, module, children):
        children.append(Child(module("sys.exit('the reason')")))
        with pytest.raises(Gone, match="it ended with status 1: the reason"):
            children[0].ask(60)

    def test_one_whose_parent_is_another_process_does_not_stay(self, module, children):
        name = module("return {}")
        command = [sys.executable, "-m", name, "1"]
        assert os.spawnve(os.P_WAIT, sys.executable, command, os.environ | {"PYTHONPATH": _path()}) == 0


def _path():
    from batch_invariant_ops.tuning.child import ROOT

    return f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"


class TestPool:
    @pytest.fixture
    def pool(self, module):
        body = """
    if question["tile"][1] == 16: signal.pause()
    if question["tile"][1] == 32: os._exit(1)
    return {"error": "no registers"} if question["tile"][1] == 256 else {}"""
        made = Pool(H100, "bfloat16", workers=2, seconds=5, module=module(body))
        yield made
        made.close()

    def test_each_is_ready_hopeless_or_hung_and_the_others_go_on(self, pool):
        crashes = Tile(m=16, n=32, k=64, warps=1, stages=2)
        ready, errors = pool.ready(POINT, [SAFE, BROKEN, HANGS, crashes, SMALL], 60)
        assert ready == [SAFE, SMALL]
        assert (
            errors[BROKEN] == "no registers" and "no answer in 5 s" in errors[HANGS] and "status 1" in errors[crashes]
        )

    def test_what_is_not_ready_in_time_is_left_out(self, pool):
        assert pool.ready(POINT, [SAFE, HANGS], 0.1) == ([SAFE], {})

    def test_points_that_share_a_kernel_compile_it_once(self, pool):
        for m in (1, 8, 16):
            assert pool.ready(Point(64, 1024, m), [SAFE], 60) == ([SAFE], {})
        assert len(pool._begun) == 1
        pool.ready(Point(64, 1000, 8), [SAFE], 60)
        assert len(pool._begun) == 2

    def test_what_is_described_by_its_shape_shares_a_kernel_over_shapes(self, pool):
        tile = replace(SAFE, form=STAYING)
        for n, k in ((64, 1024), (72, 1000), (4096, 64), (60, 1024), (1000, 1020)):
            assert pool.ready(Point(n, k, 8), [tile], 60) == ([tile], {})
        assert len(pool._begun) == 3

    def test_what_is_urgent_comes_first(self, pool):
        others = [Tile(m=64, n=64, k=64, warps=4, stages=stages) for stages in range(1, 9)]
        pool.close()  # its workers end, so that the queue stays as it is
        pool.submit(POINT, others)
        pool.submit(POINT, [others[5], SMALL], urgent=True)
        assert [kernel[0] for kernel in pool._waiting][:3] == [others[5], SMALL, others[0]]
        assert len(pool._waiting) == 9


class Ready:
    """A pool in which everything is compiled."""

    def __init__(self, *args):
        pass

    def ready(self, point, tiles, seconds):
        return list(tiles), {}

    def close(self):
        pass


class TestBench:
    @pytest.fixture
    def bench(self, module, monkeypatch):
        monkeypatch.setattr(benches, "Pool", Ready)
        name = module(MEASURING)
        made = Bench("bfloat16", lambda: Child(name), seconds=2)
        yield made
        made.close()

    def at(self, bench):
        bench.shape(Point(64, 1024, 64))
        bench.point(POINT, [SAFE], 1)
        return bench

    def test_measures(self, bench):
        assert bench.card == Card("a card", (9, 0), 132, 232448)
        assert self.at(bench).measure(SAFE, 3) == 13.0

    @pytest.mark.parametrize(
        "tile, said",
        [
            (HANGS, "no answer in 2 s"),
            (Tile(m=16, n=32, k=64, warps=1, stages=2), "status 7"),
            (Tile(m=16, n=64, k=256, warps=1, stages=2), "an illegal access"),
        ],
        ids=["hangs", "ends", "crashes"],
    )
    def test_a_guilty_tile_is_told_and_not_asked_again_and_the_next_is_measured(self, bench, tile, said):
        told = {}
        bench.avoid = told.__setitem__
        self.at(bench)
        with pytest.raises(Unfit, match=said):
            bench.measure(tile, 1)
        assert list(told) == [tile] and said in told[tile]
        with pytest.raises(Unfit, match=said):
            bench.measure(tile, 1)
        assert bench._restarts == 1
        assert bench.measure(SAFE, 1) == 11.0
        assert bench.point(POINT, [SAFE, tile], 1) == ([SAFE], 1)

    @pytest.mark.parametrize(
        "vendor, ratio, restarts",
        [
            ([{"us": 26.0}], (0.5, 0), 0),
            ([{"us": 52.0}, {"us": 26.0}, {"us": 40.0}, {"us": 30.0}], (0.5, 1), 0),
            ([{"us": 26.5}, {"us": 26.0}], (13 / 26.5, 0), 0),
            ([{"us": 26.0}, {"unfit": "no kernel"}, {"us": 13.0}], (0.5, 0), 0),
            ([{"other": 1}, {"us": 26.0}, {"other": 1}], (0.5, 1), 0),
            ([{"other": 1}], None, 0),
            ([{"unfit": "no kernel"}], None, 0),
            ([{"crash": "an illegal access"}], None, 1),
        ],
        ids=["faster", "another kernel", "hardly faster", "few kernels", "one's other bits", "other bits", "unfit",
             "crash"],
    )  # fmt: skip
    def test_a_tile_against_the_vendor(self, bench, monkeypatch, vendor, ratio, restarts):
        monkeypatch.setenv("VENDOR", repr(vendor))
        bench._restart("its environment is new")
        assert self.at(bench).over_vendor(SAFE) == ratio and bench._restarts == 1 + restarts
        assert bench.measure(SAFE, 1) == 11.0

    def test_one_of_the_vendors_that_crashes_at_its_second_time_costs_it_alone(self, bench, monkeypatch):
        second = "tile == 0 and (globals().setdefault('asked', []).append(0) or len(asked) > 1)"
        first = f"{{'crash': 'a fault'}} if {second} else {{'us': 26.0}}"
        monkeypatch.setenv("VENDOR", f"[{first}, {{'us': 26.0}}, {{'unfit': 'no more'}}]")
        bench._restart("its environment is new")
        assert self.at(bench).over_vendor(SAFE) == (0.5, 0) and bench._restarts == 1 + 2
        assert bench.measure(SAFE, 1) == 11.0

    def test_one_that_does_not_launch_needs_no_restart(self, bench):
        with pytest.raises(Unfit, match="too large"):
            self.at(bench).measure(Tile(m=16, n=256, k=64, warps=4, stages=2), 1)
        assert bench._restarts == 0 and not bench.unfit

    def test_other_bits_name_the_tile_and_the_point(self, bench):
        with pytest.raises(OtherBits, match=r"n=128.* at N=64 K=1024 M=8: 3 elements differ"):
            self.at(bench).measure(Tile(m=16, n=128, k=64, warps=4, stages=2), 1)

    def test_too_little_memory(self, bench):
        with pytest.raises(OutOfMemory, match="N=64 K=1024: too little memory for M = 8192"):
            bench.shape(Point(64, 1024, 8192))

    def test_a_gpu_that_fails_again_and_again_is_given_up(self, bench):
        bench.seconds = 0.01
        self.at(bench)
        with pytest.raises(Broken, match="ended 9 times"):
            for group in range(1, 20):
                with pytest.raises(Unfit):
                    bench.measure(Tile(m=16, n=16, k=64, warps=1, stages=2, group=group), 1)

    def test_a_process_that_does_not_start(self, module):
        with pytest.raises(Broken, match="the process that measures: it ended with status 1: no driver"):
            Bench("bfloat16", lambda: Child(module("sys.exit('no driver')")))
