"""Tile shapes of the Triton GEMM: data for speed alone, free to retune, because no entry changes a bit.

A table is a JSON file: bands of M for shapes that were measured, which others go by, too, or bands for any shape. What
a card runs is, in this order: the table that ``python -m batch_invariant_ops tune`` wrote here for a card of its name;
one that is shipped for that name; one for its compute capability; else one fixed tile, which fits every card since
sm_80.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from batch_invariant_ops import reduction

logger = logging.getLogger(__name__)

FORMAT = 1
SHIPPED = Path(__file__).with_name("tables")
NO_LIMIT = 2**62
STEPS = (*range(640, 2049, 128),)
"""M of the steps of a server's middling prompts: those that a CUDA graph launches, beyond vLLM's own."""
PLAIN, COPYING, STAYING, FLATTENED, SPECIALISED = FORMS = ("plain", "copying", "staying", "flattened", "specialised")
"""How a program reads and what it does then: through pointers, one tile; by the copy engine (TMA), one tile; by it,
tile after tile, on as many programs as there is room for (persistent); the same with all tiles' steps in one loop; by
it, one tile, with a warp that does nothing else."""
LINE = 64
"""Elements of 16 bits in a line of shared memory, as a specialised tile has them; its k is a multiple."""
WGMMA_ROWS = 64
"""Rows of the first operand that wgmma multiplies at once, per warp group."""
GENERAL_BYTES = 192 * 1024
"""Of shared memory for a tile that runs instead of a specialised one."""
ACCUMULATORS = 128
"""fp32 sums that a thread may hold, half of its registers; with more they spill."""
GENERAL_SUMS = 8 * 32 * ACCUMULATORS
"""Of a tile that runs instead of a specialised one."""
ALIGNMENT = 1024
"""Bytes that may be lost between a specialised tile's operands."""
MULTIPROCESSOR_BYTES, MULTIPROCESSOR_REGISTERS = 228 * 1024, 65536
"""Of sm_90 and sm_100; by fewer, some programs of a staying tile begin when others end."""


@dataclass(frozen=True)
class Tile:
    """How one program of the GEMM works.

    Attributes:
        m, n, k: rows and columns of the output tile, and the step along K: powers of two. A specialised tile's m and n
            may each be the sum of two, as 192 or 80, on wgmma's wide side below 64, as 40.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
        group: row tiles that share columns in L2 before the next columns come.
        swap: compute the tile's transpose, W·xᵀ, so that weights feed the wide side of the tensor core at small M.
        form: one of :data:`FORMS`; where the copy engine cannot serve, the plain one runs with all else the same. A
            specialised tile may be narrower and deeper than others, and runs as :attr:`general` where it must.
        follows: launch while the kernel before it ends, where card and Triton know of that
            (:mod:`batch_invariant_ops.ops.dependent`). Most often faster; not where programs then meet on one
            multiprocessor, or no longer read the same at once.

    Raises:
        ValueError: a value that no kernel can be made of.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    swap: bool = False
    form: str = PLAIN
    follows: bool = False

    def __post_init__(self) -> None:
        for name in ("swap", "follows"):
            if type(value := getattr(self, name)) is not bool:
                raise ValueError(f"a tile's {name} is {value!r}: true or false is needed")
        if self.form not in FORMS:
            raise ValueError(f"a tile's form is {self.form!r}: one of {', '.join(FORMS)} is needed")
        special = self.form == SPECIALISED
        powers = {"m": (16, 256), "n": (16, 256), "k": (16, 256), "warps": (1, 16)}
        if special:
            powers |= {"m": (8, 256), "n": (8, 256), "k": (LINE, 512)}
        for name, (low, high) in powers.items():
            value, bits, what = getattr(self, name), 1, "a power of two"
            whole = type(value) is int and low <= value <= high
            if special and (name == ("m" if self.swap else "n") or (name in "mn" and whole and value < WGMMA_ROWS)):
                bits, what = 2, "a power of two, or a multiple of 8 that is the sum of two,"
            if not whole or value.bit_count() > bits or (bits > 1 and value % 8):
                raise ValueError(f"a tile's {name} is {value!r}: {what} from {low} to {high} is needed")
        for name, high in (("stages", 32 if special else 8), ("group", 1024)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= high:
                raise ValueError(f"a tile's {name} is {value!r}: a whole number from 1 to {high} is needed")
        if special and (self.warps not in {max(4, self.fed // rows) for rows in (16, 32)} or self.stages < 2):
            raise ValueError(
                f"a specialised tile of {self.wide} rows for wgmma has {self.warps} warps and {self.stages} stages: "
                "a warp for 16 or 32 rows but 4 at least, and 2 stages are needed"
            )

    @property
    def wide(self) -> int:
        """Rows of the operand on the tensor core's wide side: of x, with ``swap`` of the weights."""
        return self.n if self.swap else self.m

    @property
    def thin(self) -> int:
        """Rows of the other operand."""
        return self.m if self.swap else self.n

    @property
    def wide_parts(self) -> tuple[int, ...]:
        """The power or the two powers of two that make :attr:`wide`, the larger first."""
        return _powers(self.wide)

    @property
    def thin_parts(self) -> tuple[int, ...]:
        """The power or the two powers of two that make :attr:`thin`, the larger first."""
        return _powers(self.thin)

    def programs(self, num_rows: int, num_columns: int) -> int:
        """Tiles of a result [num_rows, num_columns], each a program's unless programs go from tile to tile."""
        return -(-num_rows // self.m) * -(-num_columns // self.n)

    @property
    def fed(self) -> int:
        """Of a specialised tile: the rows that wgmma reads; beyond the tile's own, whatever lies there."""
        return max(WGMMA_ROWS, self.wide)

    @property
    def behind(self) -> int:
        """Slots behind a specialised tile's last stage, for what is read there."""
        return -(-(self.fed - self.wide) * LINE // (self.wide * self.k))

    @property
    def general(self) -> Tile:
        """Of a specialised tile, the copying one that is most like it; else the tile itself."""
        if self.form != SPECIALISED:
            return self
        thin, k = max(16, 1 << (self.thin - 1).bit_length()), min(256, self.k)
        thin = min(thin, GENERAL_SUMS // self.fed)
        warps = max(self.warps, self.fed * thin // (32 * ACCUMULATORS))
        m, n = (thin, self.fed) if self.swap else (self.fed, thin)
        while 2 * (m + n) * k * 2 > GENERAL_BYTES:
            k //= 2
        stages = min(8, GENERAL_BYTES // ((m + n) * k * 2))
        return Tile(m, n, k, warps, stages, self.group, self.swap, COPYING, self.follows)

    @property
    def stays(self) -> bool:
        """Whether a program works on several tiles, one after the other."""
        return self.form in (STAYING, FLATTENED)

    @property
    def flattened(self) -> bool:
        return self.form == FLATTENED

    @property
    def parts(self) -> int:
        """Pieces in which the result is written, so that less room is taken from the operands of a tile that stays."""
        return 2 if self.stays and self.m * self.n > 128 * 128 and self.m >= 128 and not self.swap else 1

    @property
    def residents(self) -> int:
        """Programs that a multiprocessor has room for, about."""
        registers = 32 * self.warps * min(255, self.m * self.n // (32 * self.warps) + 40)
        return max(1, min(MULTIPROCESSOR_BYTES // (self.shared_memory() + 1024), MULTIPROCESSOR_REGISTERS // registers))

    def shared_memory(self, itemsize: int = 2) -> int:
        """Bytes of a program's operands in flight, an upper bound of what Triton puts into shared memory for them.

        With the copy engine there is a barrier a stage, too; what a tile that stays writes, and the bias that it adds,
        lie beside the next one's operands.
        """
        operands = (self.m + self.n) * self.k * itemsize * self.stages
        if self.form == PLAIN:
            return operands
        if self.form == SPECIALISED:
            return operands + self.behind * self.wide * self.k * itemsize + 16 * self.stages + ALIGNMENT
        result = self.m * self.n * itemsize // self.parts
        operands += 8 * self.stages
        return operands + result + self.n * itemsize if self.stays else max(operands, result)


def _powers(rows: int) -> tuple[int, ...]:
    larger = 1 << (rows.bit_length() - 1)
    return (larger, rows - larger) if rows > larger else (larger,)


SAFE = Tile(m=64, n=64, k=32, warps=4, stages=3)
FP32 = Tile(m=64, n=64, k=32, warps=4, stages=2)
TF32 = Tile(m=128, n=128, k=32, warps=8, stages=3)
"""For any number of rows, on cards where no other tile was seen to have its bits."""
Bands = tuple[tuple[int, Tile], ...]
Ranges = tuple[tuple[int, int], ...]
Ranks = tuple[tuple[int, int], ...]
"""(M that was measured, place of the fastest kernel in cuBLASLt's own order there), ascending."""


@dataclass(frozen=True)
class Pace:
    """How fast an H200 works by a tile of fp32: on `together` programs a multiprocessor at once, in some time."""

    tile: Tile
    together: int
    us: float
    """Microseconds that they take for 4096 of K."""

    def time(self, num_rows: int, n: int) -> float:
        """Of all programs, one round after another."""
        return -(-self.tile.programs(num_rows, n) // (self.together * HOPPER_MULTIPROCESSORS)) * self.us


HOPPER_MULTIPROCESSORS = 132
HOPPER_FP32 = (
    Pace(Tile(m=16, n=16, k=64, warps=2, stages=4), 1, 102),
    Pace(Tile(m=32, n=16, k=64, warps=2, stages=4), 1, 117),
    Pace(Tile(m=16, n=32, k=64, warps=4, stages=4), 1, 147),
    Pace(Tile(m=16, n=64, k=32, warps=4, stages=4), 1, 165),
    Pace(Tile(m=16, n=128, k=32, warps=4, stages=3), 1, 299),
    Pace(Tile(m=32, n=128, k=16, warps=4, stages=4), 1, 350),
    Pace(Tile(m=128, n=64, k=16, warps=4, stages=3), 1, 450),
    Pace(Tile(m=64, n=128, k=16, warps=4, stages=3), 1, 465),
    Pace(Tile(m=128, n=128, k=32, warps=8, stages=3), 1, 797),
    Pace(Tile(m=128, n=256, k=16, warps=8, stages=3), 1, 1343),
)
HOPPER_TF32 = (
    Pace(Tile(m=16, n=64, k=64, warps=4, stages=4, swap=True), 2, 27),
    Pace(Tile(m=32, n=64, k=64, warps=4, stages=4, swap=True), 2, 30),
    Pace(Tile(m=64, n=64, k=64, warps=4, stages=3, swap=True), 2, 42),
    Pace(Tile(m=64, n=64, k=32, warps=4, stages=4), 3, 54),
    Pace(Tile(m=64, n=128, k=32, warps=4, stages=4), 2, 60),
    Pace(Tile(m=128, n=128, k=32, warps=8, stages=4), 1, 56),
    Pace(Tile(m=128, n=256, k=32, warps=8, stages=3), 1, 95),
)


@dataclass(frozen=True)
class Table:
    """Tiles by the number of rows, and where they come from.

    Attributes:
        capability: (major, minor) of the cards that it is for.
        gpu: the name of the card on which it was measured; None for a reasoned guess.
        bands: (largest M, tile), ascending, for all shapes where none was measured.
        shapes: the same for single (N, K); others go by the nearest of them.
        faster: (first M, last M) between which our kernel took less time than the vendor's, for single (N, K).
        cublas: the version of cuBLASLt that ``ranks`` are for.
        ranks: which of cuBLASLt's kernels was the fastest, for single (N, K); it deems the first to be.
    """

    capability: tuple[int, int]
    gpu: str | None
    bands: Bands
    shapes: dict[tuple[int, int], Bands]
    faster: dict[tuple[int, int], Ranges] = field(default_factory=dict)
    cublas: str | None = None
    ranks: dict[tuple[int, int], Ranks] = field(default_factory=dict)
    _bands_of: dict[tuple[int, int], Bands] = field(default_factory=dict, compare=False, repr=False)

    def tile(self, num_rows: int, n: int, k: int) -> Tile:
        bands = self._bands_of.get((n, k))
        if bands is None:
            bands = self._bands_of[n, k] = self.shapes[self.nearest(n, k)] if self.shapes else self.bands
        for largest, tile in bands:
            if num_rows <= largest:
                return tile
        return SAFE

    def nearest(self, n: int, k: int) -> tuple[int, int]:
        """The (N, K) among :attr:`shapes` that is most like this one: by ratios, and by N before K.

        Left out in turn, 18 shapes of four models ran on an H200 with the others' nearest tile at 1.05 times the time
        of their own, on average; with one that is best for all others, at 1.10 times.
        """

        def distance(shape: tuple[int, int]) -> float:
            return abs(math.log2(shape[0] / n)) + abs(math.log2(shape[1] / k)) / 2

        return min(self.shapes, key=lambda shape: (distance(shape), shape))

    def tiles(self) -> set[Tile]:
        """Every tile in it."""
        return {tile for bands in (self.bands, *self.shapes.values()) for _, tile in bands}


def choose(num_rows: int, n: int, k: int, dtype: torch.dtype, gpu: str, capability: tuple[int, int]) -> Tile:
    """The tile for M rows of one shape and dtype on a card of that name and compute capability."""
    if dtype == torch.float32:
        in_tf32 = reduction.in_tf32(dtype)
        if capability != (9, 0):
            return TF32 if in_tf32 else FP32
        return _fastest(in_tf32, num_rows, n)
    table = table_of(gpu, capability)
    return SAFE if table is None else table.tile(num_rows, n, k)


@functools.lru_cache(maxsize=4096)
def _fastest(in_tf32: bool, num_rows: int, n: int) -> Tile:
    return min(HOPPER_TF32 if in_tf32 else HOPPER_FP32, key=lambda pace: pace.time(num_rows, n)).tile


def faster(n: int, k: int, dtype: torch.dtype, gpu: str, capability: tuple[int, int]) -> Ranges:
    """The numbers of rows, (first, last), at which our kernel was measured to be faster than the vendor's."""
    table = None if dtype == torch.float32 else table_of(gpu, capability)
    return () if table is None else table.faster.get((n, k), ())


def ranks(n: int, k: int, dtype: torch.dtype, gpu: str, capability: tuple[int, int], cublas: str) -> Ranks:
    """Which of its kernels cuBLASLt of that version is to run; none where nobody measured them."""
    table = None if dtype == torch.float32 else table_of(gpu, capability)
    return () if table is None or table.cublas != cublas else table.ranks.get((n, k), ())


@functools.cache
def card(device: torch.device) -> tuple[str, tuple[int, int]]:
    """A GPU's name and compute capability."""
    if device.type != "cuda":
        return "", (0, 0)
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


@functools.cache
def table_of(gpu: str, capability: tuple[int, int]) -> Table | None:
    """The table that such a card runs, or None; what is not measured there is said in the log, once."""
    for path in (tuned(gpu), *shipped_for(gpu, capability)):
        table = _load(path, capability)
        if table is not None:
            if table.gpu is None:
                logger.info("tiles for compute capability %d.%d are not measured: correct, maybe slower", *capability)
            return table
    logger.info("no tile table for compute capability %d.%d: one fixed tile, correct but slower", *capability)
    return None


def shipped(name: str) -> Path:
    """Where a table that is shipped lies, or would: by a card's :func:`slug`, or its capability, as sm_90."""
    return SHIPPED / f"{name}.json"


def shipped_for(gpu: str, capability: tuple[int, int]) -> tuple[Path, Path]:
    """Where tables for a card are shipped: for its name, and for its compute capability."""
    major, minor = capability
    return shipped(slug(gpu)), shipped(f"sm_{major}{minor}")


def tuned(gpu: str) -> Path:
    """Where ``tune`` keeps the table of a card of that name on this machine."""
    from batch_invariant_ops import certificates

    return certificates.folder() / "tables" / f"{slug(gpu)}.json"


def slug(gpu: str) -> str:
    """nvidia-h100-80gb-hbm3 for NVIDIA H100 80GB HBM3."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") or "gpu"


def _load(path: Path, capability: tuple[int, int]) -> Table | None:
    """The table in a file, or None; one that cannot be used is named in the log."""
    try:
        table = read(path)
        if table.capability != capability:
            raise ValueError(f"it is for compute capability {table.capability}, not {capability}")
        return table
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("tile table %s is ignored: %s: %s", path, type(error).__name__, error)
        return None


def read(path: Path) -> Table:
    """The table in a file; one that names a ``base`` has that shipped table's shapes beside its own.

    Raises:
        OSError: the file cannot be read.
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if "base" not in content:
        return parse(content)
    base = json.loads(shipped(content["base"]).read_text(encoding="utf-8"))
    own, other = parse(base | {"shapes": []} | content), parse(base)
    # what the vendor takes holds for the card on which it was measured
    same = other.gpu == own.gpu
    faster = other.faster | own.faster if same else own.faster
    ranks = other.ranks | own.ranks if same and other.cublas == own.cublas else own.ranks
    return replace(own, shapes=other.shapes | own.shapes, faster=faster, ranks=ranks)


def parse(content: Any) -> Table:
    """The table in a file's JSON.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']!r}, not {FORMAT}")
    major, minor = content["capability"]
    shapes = {(shape["n"], shape["k"]): _bands(shape["bands"]) for shape in content["shapes"]}
    ranges = {(shape["n"], shape["k"]): _ranges(shape.get("faster", ())) for shape in content["shapes"]}
    ranks = {(shape["n"], shape["k"]): _ranks(shape.get("vendor", ())) for shape in content["shapes"]}
    bands, cublas = _bands(content["bands"]), content.get("cublas")
    return Table((major, minor), content["gpu"], bands, shapes, ranges, cublas, ranks)


def content_of(table: Table, **about: Any) -> dict[str, Any]:
    """What :func:`parse` reads, with facts for people to read beside it."""
    shapes = [
        {"n": n, "k": k, "faster": _plain_ranges(table.faster.get((n, k), ())),
         "vendor": [list(pair) for pair in table.ranks.get((n, k), ())],
         "bands": _plain(bands)}
        for (n, k), bands in table.shapes.items()
    ]  # fmt: skip
    start = {"format": FORMAT, "capability": list(table.capability), "gpu": table.gpu, "cublas": table.cublas}
    return start | about | {"bands": _plain(table.bands), "shapes": shapes}


def _bands(content: Any) -> Bands:
    bands = []
    for entry in content:
        values = {name: entry[name] for name in (field.name for field in fields(Tile)) if name in entry}
        bands.append((_limit(entry["up_to"]), Tile(**values)))
    bounds = [largest for largest, _ in bands]
    if not bounds or bounds[-1] != NO_LIMIT or bounds != sorted({*bounds}) or not all(type(b) is int for b in bounds):
        raise ValueError(f"its bands end at {bounds}: ascending whole numbers, null at last, are needed")
    return tuple(bands)


def _plain(bands: Bands) -> list[dict[str, Any]]:
    return [{"up_to": _plain_limit(largest), **asdict(tile)} for largest, tile in bands]


def _ranges(content: Any) -> Ranges:
    ranges = tuple((first, _limit(last)) for first, last in content)
    bounds = [bound for pair in ranges for bound in pair]
    if not all(type(bound) is int and bound > 0 for bound in bounds) or bounds != sorted(bounds):
        raise ValueError(f"our kernel is faster for M of {list(content)}: ascending ranges of whole numbers are needed")
    return ranges


def _ranks(content: Any) -> Ranks:
    ranks = tuple((num_rows, rank) for num_rows, rank in content)
    measured = [num_rows for num_rows, _ in ranks]
    whole = all(type(number) is int and number >= 0 for pair in ranks for number in pair)
    if not whole or measured != sorted({*measured}):
        raise ValueError(f"the vendor's kernels are {list(content)}: pairs of whole numbers, ascending, are needed")
    return ranks


def _plain_ranges(ranges: Ranges) -> list[list[int | None]]:
    return [[first, _plain_limit(last)] for first, last in ranges]


def _limit(said: Any) -> Any:
    """The largest M of a band in a file, where null is none."""
    return NO_LIMIT if said is None else said


def _plain_limit(largest: int) -> int | None:
    return None if largest == NO_LIMIT else largest
