"""How a tile is measured: bits first, then calls that wait in a queue, over weights that the L2 cache cannot hold.

CUDA's clock and memory are imitated; operands, results and comparisons are real ones.
"""

from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch

from batch_invariant_ops.ops import cublaslt, matmul, vendor_gemm
from batch_invariant_ops.tiles import SAFE, Tile
from batch_invariant_ops.tuning import measuring

TILE = Tile(m=16, n=32, k=64, warps=4, stages=2)
BYTES = 64 * 128 * 2


class Cuda:
    """A GPU on which a call takes 25 µs, 1 µs on the host, and a sleep as long as was asked for."""

    def __init__(self, monkeypatch):
        self.free, self.l2, self.broken, self.late = 2**30, 4 * BYTES, False, 0
        self.now, self.calls, self.sleeps, self.used = 0.0, 0, [], []
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.now

            def query(self):
                cuda.late -= 1
                return cuda.late >= 0

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return (other.at - self.at) / 1e3

        for name, value in {
            "Event": Event, "_sleep": self.sleeps.append, "synchronize": self.synchronize,
            "empty_cache": lambda: None, "mem_get_info": lambda device: (self.free, 2**40),
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=self.l2),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(measuring, "WARMING", 0.0)
        self.real = matmul.gemm
        monkeypatch.setattr(matmul, "gemm", self.gemm)

    def synchronize(self):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def gemm(self, a, b, *, tile):
        self.now += 25.0
        self.calls += 1
        self.used.append(b.data_ptr())
        return self.real(a, b)


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


@pytest.fixture
def gpu(cuda):
    made = measuring.Gpu()
    made.device = torch.device("cpu")
    assert made.answer({"do": "shape", "n": 64, "k": 128, "m": 32, "dtype": "bfloat16"}) == {}
    assert made.answer({"do": "point", "m": 8}) == {}
    return made


def ask(gpu, rounds=1, tile=TILE):
    return gpu.answer({"do": "time", "tile": list(astuple(tile)), "rounds": rounds})


def test_time_is_the_gpus_by_call(gpu, cuda):
    before = cuda.calls
    assert ask(gpu, rounds=3) == {"us": 25.0}
    assert cuda.calls - before == 1 + 1 + 3 * 16  # bits, an estimate, three rounds
    before = cuda.calls
    assert ask(gpu, rounds=3) == {"us": 25.0} and cuda.calls - before == 3 * 16


def test_the_weights_exceed_the_cache_and_come_in_turn(gpu, cuda):
    assert len(gpu.weights) * BYTES >= 3 * cuda.l2
    ask(gpu)
    last = cuda.used[-len(gpu.weights) :]
    assert len({*last}) == len(gpu.weights) and {*last} == {w.data_ptr() for w in gpu.weights}
    assert all(torch.equal(w, gpu.weights[0]) for w in gpu.weights)


def test_a_queue_that_ran_dry_is_measured_again_behind_a_longer_sleep(gpu, cuda):
    cuda.late = 2
    assert gpu.round(TILE, 4) == 25.0
    assert cuda.sleeps[-3:] == [measuring.SLEEP, 2 * measuring.SLEEP, 4 * measuring.SLEEP]
    gpu.round(TILE, 4)
    assert cuda.sleeps[-1] == 4 * measuring.SLEEP
    cuda.late = 10**6
    gpu.round(TILE, 4)
    assert cuda.sleeps[-1] == measuring.MOST_SLEEP


def test_another_bit_in_one_element_is_seen(gpu):
    assert "us" in ask(gpu)
    gpu.reference[3, 5] = -gpu.reference[3, 5]
    assert "us" in ask(gpu)  # its bits were compared at this point before
    gpu.point(8)
    assert ask(gpu) == {"other": 1}
    gpu.point(3)
    assert "us" in ask(gpu)  # the row is not among them


@pytest.mark.parametrize("broken, key", [(False, "unfit"), (True, "crash")])
def test_what_does_not_launch_is_unfit_and_what_loses_the_context_is_a_crash(gpu, cuda, monkeypatch, broken, key):
    def fail(a, b, *, tile):
        cuda.broken = broken
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(matmul, "gemm", fail)
    assert ask(gpu) == {key: "RuntimeError: out of resource: shared memory"}


def test_the_vendor_is_held_to_the_same_bits_and_clock(gpu, cuda, monkeypatch):
    result = gpu.reference.clone()

    def vendor(a, b, bias, rank):
        if rank == 2:
            raise cublaslt.NoKernel("cuBLASLt has 2 kernels without workspace for 8 rows")
        cuda.now += 40.0 + rank
        return result[: len(a)]

    monkeypatch.setattr(vendor_gemm, "call", vendor)
    assert gpu.answer({"do": "time", "tile": 0, "rounds": 3}) == {"us": 40.0}
    assert gpu.answer({"do": "time", "tile": 1, "rounds": 3}) == {"us": 41.0}
    assert "2 kernels" in gpu.answer({"do": "time", "tile": 2, "rounds": 3})["unfit"]
    gpu.point(8)
    gpu.reference[0, 0] += 1
    assert gpu.answer({"do": "time", "tile": 0, "rounds": 3}) == {"other": 1}


def test_too_little_memory_is_said(gpu, cuda):
    cuda.free = 0
    assert gpu.answer({"do": "shape", "n": 64, "k": 128, "m": 32, "dtype": "bfloat16"}) == {"memory": True}


def test_little_memory_makes_fewer_copies(gpu, cuda):
    cuda.free = 3 * 32 * 64 * 2 + 5 * BYTES
    assert gpu.shape(64, 128, 32, "bfloat16") == {} and len(gpu.weights) == 3


def test_the_fixed_tile_is_the_reference(gpu):
    assert ask(gpu, tile=SAFE)["us"] == 25.0
    assert gpu.reference.shape == (32, 64)
