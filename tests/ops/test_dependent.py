"""Where kernels are launched while the one before them ends: on cards, drivers and with tiles that know of it alone."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from batch_invariant_ops import tiles
from batch_invariant_ops.ops import dependent, matmul

pytest.importorskip("triton")
OLDER_TRITON = """
import sys, types, triton
sys.modules["triton.language.extra.cuda"] = types.ModuleType("cuda")
from batch_invariant_ops.ops import dependent, matmul, rms_norm
kernels = matmul._matmul_kernel, matmul._copying_kernel, rms_norm._rms_norm_kernel
named = hasattr(dependent, "follow") and all(kernel.cache_key for kernel in kernels)
print(dependent.KERNELS, dependent.follows((9, 0)), named)
"""
TILE = tiles.Tile(m=16, n=32, k=64, warps=4, stages=2, follows=True)


@pytest.fixture
def machine(monkeypatch):
    """machine(driver, cuda): a machine with a driver that knows so new a CUDA, and torch built for that one."""

    def make(driver, cuda="13.0"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(dependent, "_driver", lambda: driver)
        dependent.follows.cache_clear()
        dependent._known.cache_clear()

    yield make
    dependent.follows.cache_clear()
    dependent._known.cache_clear()


@pytest.mark.parametrize(
    "capability, driver, cuda, follows",
    [
        ((9, 0), 13000, "13.0", True),
        ((12, 0), 12030, "12.8", True),
        ((8, 9), 13000, "13.0", False),
        ((9, 0), 12020, "12.8", False),
        ((9, 0), 0, "13.0", False),
        ((9, 0), 13000, None, False),
    ],
)
def test_it_takes_a_card_a_driver_and_a_torch_that_know_of_it(machine, capability, driver, cuda, follows):
    machine(driver, cuda)
    assert dependent.follows(capability) is follows


def test_triton_s_interpreter_does_not(machine, monkeypatch):
    monkeypatch.setattr(dependent.triton.knobs.runtime, "interpret", True)
    machine(13000)
    assert not dependent.follows((9, 0))


@pytest.mark.parametrize("capability, follows", [((9, 0), True), ((8, 0), False)])
def test_a_tile_says_whether_its_kernel_does(machine, monkeypatch, capability, follows):
    machine(13000)
    monkeypatch.setattr(matmul, "_capability", lambda device: capability)
    a, b = torch.ones(1, 8, 64), torch.ones(1, 64, 32)

    def options(tile):
        return matmul._call(a, b, None, torch.empty(1, 8, 32), tile)[3]

    assert (options(TILE)["FOLLOWS"], options(TILE).get("launch_pdl", False)) == (follows, follows)
    alone = options(replace(TILE, follows=False))
    assert not alone["FOLLOWS"] and "launch_pdl" not in alone


def test_what_runs_instead_of_a_specialised_tile_is_launched_as_it_is():
    tile = tiles.Tile(m=64, n=32, k=128, warps=4, stages=8, form=tiles.SPECIALISED, follows=True)
    assert tile.general.follows and not replace(tile, follows=False).general.follows


def test_follows_is_true_or_false():
    with pytest.raises(ValueError, match="a tile's follows is 1: true or false is needed"):
        replace(TILE, follows=1)


def test_kernels_are_compiled_by_a_triton_that_does_not_know_of_it():
    """Their cache keys go by all that they name, and to Triton 3.6 what is not there ends in an AttributeError."""
    done = subprocess.run([sys.executable, "-c", OLDER_TRITON], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["()", "False", "True"], done.stderr
