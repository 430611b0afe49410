"""Kernels that are launched while the one before them ends: the same bits, whatever stands before and behind them."""

from dataclasses import replace

import pytest
import torch

import batch_invariant_ops as ours
from batch_invariant_ops import tiles
from batch_invariant_ops.ops import dependent, matmul
from batch_invariant_ops.proof import probe, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda")
HIDDEN, INNER, LAYERS = 1024, 3584, 6
FOLLOWING = [
    tiles.Tile(m=16, n=64, k=128, warps=4, stages=4, follows=True),
    tiles.Tile(m=16, n=64, k=128, warps=4, stages=4, swap=True, form=tiles.COPYING, follows=True),
    tiles.Tile(m=64, n=128, k=64, warps=4, stages=3, form=tiles.FLATTENED, follows=True),
    tiles.Tile(m=64, n=32, k=128, warps=4, stages=8, form=tiles.SPECIALISED, follows=True),
    tiles.Tile(m=16, n=24, k=256, warps=4, stages=5, swap=True, form=tiles.SPECIALISED, follows=True),
]


@pytest.fixture(autouse=True)
def needs_a_card_that_knows():
    if not dependent.follows(torch.cuda.get_device_capability()):
        pytest.skip("neither the card nor its driver knows of dependent launches")


def model(values, tile):
    """Layers of ours and of torch's kernels in turns, each of which reads what the one before it wrote."""
    layers = [
        [(0.03 * values(*shape, seed=10 * layer + part)).bfloat16() for part, shape in enumerate(shapes)]
        for layer in range(LAYERS)
        for shapes in [((HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER))]
    ]
    scale = values(HIDDEN, dtype=torch.bfloat16, seed=99)

    def run(x):
        residual = x.clone()
        for across, up, down in layers:
            x = matmul.gemm(x, across.t(), tile=tile)
            x, residual = ours.rms_norm(x, scale, residual=residual)
            h = matmul.gemm(x, up.t(), tile=tile)
            h = torch.nn.functional.silu(h[:, :INNER]) * h[:, INNER:]
            x, residual = ours.rms_norm(matmul.gemm(h, down.t(), tile=tile), scale, residual=residual)
        return x

    return run


@pytest.mark.parametrize("tile", FOLLOWING, ids=lambda tile: f"{tile.form}-{tile.m}x{tile.n}")
def test_the_kernel_waits_for_the_one_before(tile):
    x, w, bias = probe(70, 520, 1024, torch.bfloat16, GPU, True)
    assert "griddepcontrol.wait" in matmul.warm_up(x, w.t(), tile=tile).asm["ptx"]
    assert "griddepcontrol" not in matmul.warm_up(x, w.t(), tile=replace(tile, follows=False)).asm["ptx"]
    assert same_bits(matmul.gemm(x, w.t(), bias, tile=tile), matmul.gemm(x, w.t(), bias, tile=tiles.SAFE))


@pytest.mark.parametrize("m", [1, 16, 130])
@pytest.mark.parametrize("tile", FOLLOWING, ids=lambda tile: f"{tile.form}-{tile.m}x{tile.n}")
def test_a_chain_has_the_bits_that_it_has_without(tile, m, values):
    """Memory is used again all along the chain, so that a kernel that began too early would read or spoil another's."""
    x = values(m, HIDDEN, dtype=torch.bfloat16)
    expected = model(values, replace(tile, follows=False))(x)
    run = model(values, tile)
    for _ in range(20):
        assert same_bits(run(x), expected)
    torch.cuda.synchronize()
    graph, always = torch.cuda.CUDAGraph(), torch.ones((), dtype=torch.bool, device=GPU)
    with torch.cuda.graph(graph):
        y = run(x)
    for _ in range(500):
        graph.replay()
        always &= (y.view(torch.int16) == expected.view(torch.int16)).all()
    assert bool(always)


def test_on_two_streams_at_once(values):
    runs = [model(values, tile) for tile in FOLLOWING[2:4]]
    inputs = [values(m, HIDDEN, dtype=torch.bfloat16, seed=m) for m in (3, 40)]
    expected = [run(x) for run, x in zip(runs, inputs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in runs]
    for _ in range(50):
        found = []
        for run, x, stream in zip(runs, inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(x))
        torch.cuda.synchronize()
        assert all(map(same_bits, found, expected))
