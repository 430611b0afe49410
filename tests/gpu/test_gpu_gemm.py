"""Our GEMM's freedoms on a GPU change no bit: tiles, graphs, the compiler, streams, repetition, padding, the mode."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import batch_invariant_ops as ours
from batch_invariant_ops import tiles
from batch_invariant_ops.ops import linear, matmul, specialised
from batch_invariant_ops.proof import agreement, probe, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda", 0)
HALVES = [torch.bfloat16, torch.float16]
COPIED = [
    tiles.Tile(m=128, n=128, k=64, warps=4, stages=3),
    tiles.Tile(m=128, n=256, k=64, warps=8, stages=3),
    tiles.Tile(m=128, n=256, k=64, warps=8, stages=4),
    tiles.Tile(m=256, n=128, k=64, warps=8, stages=3),
    tiles.Tile(m=64, n=256, k=64, warps=8, stages=4, group=3),
    tiles.Tile(m=64, n=64, k=128, warps=4, stages=3),
    tiles.Tile(m=16, n=64, k=128, warps=4, stages=4, swap=True),
    tiles.Tile(m=64, n=128, k=64, warps=4, stages=4, swap=True),
]


SPECIALISED = [
    tiles.Tile(m=8, n=32, k=256, warps=4, stages=10, swap=True, form=tiles.SPECIALISED),
    tiles.Tile(m=16, n=16, k=512, warps=4, stages=6, swap=True, form=tiles.SPECIALISED),
    tiles.Tile(m=32, n=64, k=64, warps=4, stages=2, swap=True, form=tiles.SPECIALISED),
    tiles.Tile(m=32, n=128, k=64, warps=8, stages=8, swap=True, form=tiles.SPECIALISED),
    tiles.Tile(m=64, n=32, k=128, warps=4, stages=8, form=tiles.SPECIALISED),
    tiles.Tile(m=128, n=64, k=128, warps=8, stages=4, form=tiles.SPECIALISED),
    tiles.Tile(m=24, n=16, k=256, warps=4, stages=6, swap=True, form=tiles.SPECIALISED),
    tiles.Tile(m=32, n=40, k=128, warps=4, stages=8, form=tiles.SPECIALISED),
    tiles.Tile(m=32, n=40, k=256, warps=4, stages=5, swap=True, form=tiles.SPECIALISED),
    tiles.Tile(m=40, n=24, k=128, warps=4, stages=9, form=tiles.SPECIALISED),
    tiles.Tile(m=16, n=24, k=64, warps=4, stages=16, swap=True, form=tiles.SPECIALISED),
    tiles.Tile(m=128, n=80, k=64, warps=8, stages=5, form=tiles.SPECIALISED),
    tiles.Tile(m=192, n=128, k=64, warps=8, stages=5, swap=True, form=tiles.SPECIALISED),
    tiles.Tile(m=64, n=144, k=128, warps=4, stages=4, form=tiles.SPECIALISED),
    tiles.Tile(m=64, n=256, k=64, warps=4, stages=2, form=tiles.SPECIALISED),
    tiles.Tile(m=128, n=128, k=64, warps=4, stages=6, form=tiles.SPECIALISED),
    tiles.Tile(m=256, n=160, k=64, warps=8, stages=4, form=tiles.SPECIALISED),
]


def shared_memory():
    return getattr(torch.cuda.get_device_properties(0), "shared_memory_per_block_optin", 99 * 1024)


def copied(form):
    """The tiles that are tried in each form, those that fit."""
    made = SPECIALISED if form == tiles.SPECIALISED else [replace(tile, form=form) for tile in COPIED]
    return [tile for tile in made if tile.shared_memory() <= shared_memory()]


def every_tile():
    """The tiles of this card's tables, and of the others' that fit into its shared memory by the operands' size."""
    limit = shared_memory()
    shipped = [tiles.read(path) for path in tiles.SHIPPED.glob("*.json")]
    here = torch.cuda.get_device_capability()
    own = {tile for table in shipped if table.capability == here for tile in table.tiles()}
    others = {tile for table in shipped for tile in table.tiles() if tile.shared_memory() <= limit}
    forms = {tile for form in tiles.FORMS for tile in copied(form)}
    return sorted(own | others | {tiles.SAFE} | forms, key=repr)


def extremes():
    """Of the tiles that do not read through pointers, the smallest and the largest of each way to work."""
    found = {}
    for tile in every_tile():
        if tile.form != tiles.PLAIN:
            found.setdefault((tile.form, tile.swap, tile.parts), []).append(tile)
    return {choose(alike, key=lambda tile: tile.m * tile.n) for alike in found.values() for choose in (min, max)}


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
def test_every_tile_gives_the_same_bits(dtype):
    x, w, _ = probe(200, 520, 1024, dtype, GPU)
    expected = matmul.gemm(x, w.t(), tile=tiles.SAFE)
    for tile in every_tile():
        for m in (1, 17, 200):
            assert same_bits(matmul.gemm(x[:m], w.t(), tile=tile), expected[:m]), (tile, m)


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "n, k", [(264, 1000), (1000, 72), (520, 8), (2056, 4104), (264, 192), (260, 1024), (264, 1020)]
)
def test_every_form_gives_the_same_bits_at_every_edge(dtype, n, k):
    """Ragged N and K; the last two are none that the copy engine can serve."""
    x, w, bias = probe(700, n, k, dtype, GPU, True)
    for b in (None, bias):
        expected = matmul.gemm(x, w.t(), b, tile=tiles.SAFE)
        for tile in extremes():
            for m in (1, 65, 300, 700):
                assert same_bits(matmul.gemm(x[:m], w.t(), b, tile=tile), expected[:m]), (tile, m)


@pytest.mark.parametrize("form", tiles.FORMS)
def test_many_tiles_a_program_have_the_fixed_tiles_bits_each_time(form):
    x, w, _ = probe(4096, 4096, 512, torch.bfloat16, GPU)
    expected = matmul.gemm(x, w.t(), tile=tiles.SAFE)
    for tile in copied(form):
        for _ in range(20):
            assert same_bits(matmul.gemm(x, w.t(), tile=tile), expected), tile


@pytest.mark.parametrize("form", tiles.FORMS)
def test_every_form_is_captured_in_a_graph(form):
    x, w, bias = probe(300, 520, 1024, torch.bfloat16, GPU, True)
    expected = matmul.gemm(x, w.t(), bias, tile=tiles.SAFE)
    tile = copied(form)[0]
    matmul.gemm(x, w.t(), bias, tile=tile)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul.gemm(x, w.t(), bias, tile=tile)
    for _ in range(100):
        y.zero_()
        graph.replay()
        assert same_bits(y, expected)


@pytest.mark.parametrize("form", tiles.FORMS)
def test_calls_that_differ_in_what_is_compiled_for_each_get_their_own_kernel(form, values):
    """Compiled kernels are kept, so a call with operands like another's in all but one thing comes right after it."""
    tile = copied(form)[0]
    room = {dtype: values(64, 2 * 520 + 8, dtype=dtype, seed=1) for dtype in (torch.bfloat16, torch.float16)}

    def operands(m=40, n=520, k=512, at=0, dtype=torch.bfloat16, has_bias=True, wide=False):
        x = values(m, k + at, dtype=dtype)[:, at:] if at else values(m, k, dtype=dtype)
        w = (0.1 * values(n, k, seed=2)).to(dtype)
        w = torch.cat((w, w), 1)[:, :k] if wide else w
        return x, w.t(), room[dtype][0, at : n + at] if has_bias else None

    asked = [
        operands(), operands(at=1), operands(at=8), operands(m=1), operands(n=519), operands(n=16), operands(k=511),
        operands(k=500), operands(dtype=torch.float16), operands(has_bias=False), operands(wide=True),
    ]  # fmt: skip
    for turn in range(2):
        for x, w, bias in asked:
            y = matmul.gemm(x, w, bias, tile=tile)
            exact = x.double() @ w.double() + (0 if bias is None else bias.double())
            assert bool(((y.double() - exact).abs() <= 0.01 * exact.abs() + 0.02).all()), (turn, x.shape, w.shape)
            copies = (None if t is None else t.clone(memory_format=torch.contiguous_format) for t in (x, w, bias))
            assert same_bits(y, matmul.gemm(*copies, tile=tiles.SAFE))


def test_on_this_card_the_copy_engine_is_what_runs():
    # asked here and not in a mark: whoever collects the tests must not use CUDA before its settings are made
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no copy engine")
    x, w, _ = probe(8, 64, 64, torch.bfloat16, GPU)
    kernel = matmul.warm_up(x, w.t(), tile=copied(tiles.COPYING)[0])
    assert "cp.async.bulk.tensor" in kernel.asm["ptx"]


@pytest.mark.parametrize("tile", SPECIALISED, ids=lambda tile: f"{tile.m}x{tile.n}x{tile.k}")
def test_on_this_card_the_specialised_form_is_what_runs(tile):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the form is for sm_90")
    x, w, bias = probe(300, 520, 1024, torch.bfloat16, GPU, True)
    kernel, *_ = matmul._call(x[None], w.t()[None], bias, x.new_empty(1, 300, 520), tile)
    assert kernel in specialised.KERNELS
    matmul.gemm(x, w.t(), bias, tile=tile)
    assert not specialised._failed


@pytest.mark.parametrize("tile", SPECIALISED, ids=lambda tile: f"{tile.m}x{tile.n}x{tile.k}")
@pytest.mark.parametrize("n, k", [(1280, 8192), (896, 4864), (1000, 1088)])
def test_specialised_tiles_have_the_fixed_tiles_bits_each_time(tile, n, k):
    """Far more turns of the ring of slots than there are slots, and neighbours that are no numbers."""
    x, w, _ = probe(130, n, k, torch.bfloat16, GPU)
    x[5], x[77] = torch.nan, torch.inf
    expected = matmul.gemm(x, w.t(), tile=tiles.SAFE)
    rest = [row for row in range(130) if row not in (5, 77)]
    for m in (1, 6, 64, 78, 130):
        kept = [row for row in rest if row < m]
        for _ in range(50):
            y = matmul.gemm(x[:m], w.t(), tile=tile)
            assert same_bits(y[kept], expected[kept]), m
            assert bool(y[5:6].isnan().all()) and not bool(y[77:78].isfinite().any())


def test_the_probe_would_show_another_order_of_summation():
    x, w, _ = probe(64, 512, 1024, torch.bfloat16, GPU)
    whole = matmul.gemm(x, w.t(), tile=tiles.SAFE)
    split = sum(matmul.gemm(x[:, at : at + 512].float(), w[:, at : at + 512].float().t()) for at in (0, 512))
    assert (split.bfloat16() != whole)[::2].float().mean() > 0.5


@pytest.mark.parametrize("k", [1, 40, 1000])
def test_depths_that_no_tile_divides(k, values):
    x, w, bias = (values(*shape, dtype=torch.bfloat16) for shape in ((70, k), (33, k), (33,)))
    exact = x.double() @ w.double().t() + bias.double()
    size = x.double().abs() @ w.double().t().abs() + bias.double().abs()
    for _ in range(4):
        y = ours.linear(x, w, bias)
        assert bool(((y.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * size).all())
        assert same_bits(y[-1:], ours.linear(x[-1:].clone(), w, bias))


@pytest.fixture
def switch():
    """torch's own between fp32 as it is and TF32."""
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.mark.parametrize(
    "precision, one, paces", [("ieee", tiles.FP32, tiles.HOPPER_FP32), ("tf32", tiles.TF32, tiles.HOPPER_TF32)]
)
@pytest.mark.parametrize("n, k", [(520, 1024), (264, 1000), (896, 4864), (33, 41)])
def test_every_tile_of_fp32_has_the_bits_of_the_one_that_other_cards_run(switch, precision, one, paces, n, k):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the tiles are for sm_90")
    switch.fp32_precision = precision
    x, w, bias = probe(300, n, k, torch.float32, GPU, True)
    small = 2.0**-80  # whose products fp32 cannot hold
    for a, b, c in ((x, w.t(), bias), (x, w.t().contiguous(), None), (x * small, w.t() * small, None)):
        expected = matmul.gemm(a, b, c, tile=one)
        for pace in paces:
            for m in (1, 17, 300):
                assert same_bits(matmul.gemm(a[:m], b, c, tile=pace.tile), expected[:m]), (pace, m)


class TestTF32:
    """Where torch's switch asks for it."""

    @pytest.fixture(autouse=True)
    def asked_for(self, switch):
        switch.fp32_precision = "tf32"

    @pytest.mark.parametrize("n, k", [(520, 1024), (264, 1000), (33, 41)])
    @pytest.mark.parametrize("packed", [True, False])
    def test_rows_keep_their_bits(self, values, n, k, packed):
        x, w, bias = values(700, k), values(n, k, seed=1), values(n, seed=2)
        b = w.t() if packed else w.t().contiguous()
        x[5], x[77] = torch.nan, torch.inf
        y = matmul.gemm(x, b, bias)
        rest = [row for row in range(700) if row not in (5, 77)]
        assert all(same_bits(matmul.gemm(x[row : row + 1], b, bias), y[row : row + 1]) for row in rest[::23])
        for m in (2, 16, 64, 129, 300, 699):
            assert same_bits(matmul.gemm(x[:m], b, bias)[6:70], y[:m][6:70])
            shifted = torch.empty(m * k + 1, device="cuda")[1:].view(m, k).copy_(x[:m])
            assert same_bits(matmul.gemm(shifted, b, bias)[6:70], y[:m][6:70])
        for _ in range(100):
            assert same_bits(matmul.gemm(x, b, bias)[rest], y[rest])

    def test_it_is_what_runs_and_no_other_type_has_it(self, values):
        x, w = values(64, 1024), values(512, 1024, seed=1)
        exact = x.double() @ w.double().t()
        errors = {}
        for precision in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            errors[precision] = float((ours.linear(x, w).double() - exact).norm() / exact.norm())
            halves = matmul.gemm(x.bfloat16(), w.bfloat16().t())
            assert same_bits(halves, matmul.gemm(x.bfloat16(), w.bfloat16().t(), tile=tiles.SAFE))
        assert errors["ieee"] < 1e-6 and 1e-5 < errors["tf32"] < 2e-3, errors

    def test_the_mode_and_the_compiler_have_it_too(self, values):
        w, x = values(512, 1024, seed=1), values(300, 1024)
        expected = matmul.gemm(x, w.t())
        with ours.set_batch_invariant_mode():
            assert same_bits(x @ w.t(), expected)
            compiled = torch.compile(lambda rows: F.linear(rows, w), fullgraph=True, dynamic=True)
            for m in (300, 2, 1):
                assert same_bits(compiled(x[:m]), expected[:m])


def layer(values):
    w, bias, scale = (values(*shape, dtype=torch.bfloat16, seed=9) for shape in ((512, 1024), (512,), (1024,)))

    def run(x):
        h = ours.linear(ours.rms_norm(x, scale), w, bias)
        return ours.log_softmax(h.float()) + ours.mean(h.float(), -1, keepdim=True)

    return run


def test_a_cuda_graph_replays_the_bits_ten_thousand_times(values):
    run, x = layer(values), values(7, 1024, dtype=torch.bfloat16)
    for _ in range(3):
        expected = run(x)
    torch.cuda.synchronize()
    graph, always = torch.cuda.CUDAGraph(), torch.ones((), dtype=torch.bool, device="cuda")
    with torch.cuda.graph(graph):
        always &= same_bits(run(x), expected)
    for _ in range(10_000):
        graph.replay()
    assert bool(always)
    x[3, 5] += 1
    graph.replay()
    assert not bool(always)


@pytest.mark.parametrize("m", [1, 2, 24, 200])
def test_a_graph_of_any_size_has_the_bits_of_a_large_batch(m, values):
    run, x = layer(values), values(200, 1024, dtype=torch.bfloat16)
    for _ in range(3):
        whole = run(x)
    part = x[:m].clone()
    run(part)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(part)
    graph.replay()
    assert same_bits(y, whole[:m])


def test_a_gemm_first_met_in_a_graph_runs_ours(values):
    """No proof can be made while a graph is captured, and none is remembered as lost."""
    x, w = values(8, 1024, dtype=torch.bfloat16), values(328, 1024, dtype=torch.bfloat16)
    expected = matmul.gemm(x, w.t())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ours.linear(x, w)
    graph.replay()
    assert same_bits(y, expected)
    assert not any(key[:2] == (328, 1024) for key in linear.windows())


def test_a_compiled_model_keeps_the_bits_for_any_number_of_rows(values):
    w, bias = values(512, 1024, dtype=torch.bfloat16, seed=9), values(512, dtype=torch.bfloat16, seed=9)

    def model(x):
        h = F.silu(F.linear(x * 2, w, bias))
        return torch.log_softmax(h.float(), -1) + h.float().mean(-1, keepdim=True)

    x = values(300, 1024, dtype=torch.bfloat16)
    with ours.set_batch_invariant_mode():
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        whole = compiled(x)
        for m in (2, 5, 64, 299, 1):
            assert same_bits(compiled(x[:m]), whole[:m]), m


def test_two_streams_at_once(values):
    run = layer(values)
    inputs = [values(m, 1024, dtype=torch.bfloat16, seed=m) for m in (5, 900)]
    expected = [run(x) for _ in range(3) for x in inputs][-2:]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    verdicts = []
    for _ in range(200):
        for stream, x, y in zip(streams, inputs, expected, strict=True):
            with torch.cuda.stream(stream):
                verdicts.append(same_bits(run(x), y))
    torch.cuda.synchronize()
    assert all(torch.stack(verdicts).tolist())


def test_a_weight_of_odd_width_is_given_room_and_keeps_its_bits(values):
    weight = torch.nn.Parameter(values(1001, 256, dtype=torch.bfloat16))
    bias = torch.nn.Parameter(values(1001, dtype=torch.bfloat16))
    before, x = weight.detach().clone(), values(40, 256, dtype=torch.bfloat16)
    expected = matmul.gemm(x, before.t(), bias.detach())
    linear.prepare(weight, bias)
    assert same_bits(weight.detach(), before) and weight.is_contiguous() and weight.shape == (1001, 256)
    assert any(key[:2] == (1008, 256) for key in linear.windows())
    with torch.no_grad():
        y = ours.linear(x, weight, bias)
        assert y.is_contiguous() and same_bits(y, expected)
        assert same_bits(ours.linear(x[:1], weight, bias), expected[:1])
        weight.mul_(2)  # as when new weights are loaded into a running server
        assert same_bits(ours.linear(x, weight, bias), matmul.gemm(x, before.t() * 2, bias.detach()))


class TestMode:
    def test_rows_keep_their_bits_in_torchs_own_names(self, values):
        w, bias = values(1024, 512, seed=1), values(512, seed=2)
        named = [
            lambda x: x @ w,
            lambda x: torch.addmm(bias, x, w),
            lambda x: F.linear(x, w.t(), bias),
            lambda x: torch.einsum("zmk,kn->zmn", x[None], w)[0],
            lambda x: x.softmax(-1),
            lambda x: x.log_softmax(-1),
            lambda x: x.mean(-1),
        ]
        x = values(300, 1024)
        with ours.set_batch_invariant_mode():
            for operation in named:
                assert all(agreement(operation, operation(x), x, [1, 2, 3, 16, 100, 299]))

    def test_what_is_not_ours_is_torchs(self, values):
        x = values(5, 5).double()
        plain = x @ x, x.softmax(-1), x.mean(0)
        with ours.set_batch_invariant_mode():
            for a, b in zip((x @ x, x.softmax(-1), x.mean(0)), plain, strict=True):
                assert same_bits(a, b)
            with pytest.raises(RuntimeError, match="same device"):
                torch.mm(values(2, 3), torch.ones(3, 4))
            with pytest.raises(RuntimeError):
                torch.mm(values(2, 3), values(4, 5))
            assert torch.softmax(values(3, 4).half(), -1, dtype=torch.float32).dtype == torch.float32

    def test_gradients(self, values):
        def gradients(mode):
            leaves = [values(9, 64).requires_grad_(), values(32, 64, seed=1).requires_grad_()]
            with ours.set_batch_invariant_mode(mode):
                return torch.autograd.grad(F.linear(*leaves).log_softmax(-1).square().mean(), leaves)

        for a, b in zip(gradients(True), gradients(False), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_thinking_machines_check(self, dtype):
        a = torch.linspace(-100, 100, 2048 * 4096, dtype=dtype, device="cuda").reshape(2048, 4096)
        b = torch.linspace(-100, 100, 4096 * 4096, dtype=dtype, device="cuda").reshape(4096, 4096)
        with ours.set_batch_invariant_mode():
            assert all((torch.mm(a[:1], b) - torch.mm(a, b)[:1]).abs().max().item() == 0 for _ in range(4))
