"""Measure which tiles our Triton GEMM runs fastest with on the GPU at hand, and keep them as its tile table.

A table changes speed alone: every tile's bits are compared with the fixed tile's before it may be in one. Servers on a
card of this name then use the table, from $BATCH_INVARIANT_CACHE or ~/.cache/batch_invariant.

What is measured is kept at once in a journal beside the table. A run that was stopped goes on by the same command, and
shapes that are measured later are added to those before.

Exit status: 0 when the table is written, 1 where a tile gave other bits or the GPU failed, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from batch_invariant_ops import certificates, tiles
from batch_invariant_ops.cli import checks, shapes
from batch_invariant_ops.cli.errors import BadInput
from batch_invariant_ops.cli.progress import Progress, clock
from batch_invariant_ops.tuning import bands
from batch_invariant_ops.tuning.bench import Bench, Broken
from batch_invariant_ops.tuning.journal import Journal, Unusable
from batch_invariant_ops.tuning.run import Run, measurements, weight
from batch_invariant_ops.tuning.search import NothingRan, OtherBits
from batch_invariant_ops.whole_files import write_whole

DTYPES = ("bfloat16", "float16")
LEAST_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's flags."""
    shapes.add_arguments(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="default: the model's, else bfloat16; a table serves both")
    parser.add_argument("--max-tokens", type=int, default=8192, metavar="M", help="the largest M (8192)")
    parser.add_argument("--seconds", type=float, default=300.0, metavar="S", help="about how long it may take (300)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table; default: where servers here look for it")
    parser.add_argument(
        "--keep-tiles",
        action="store_true",
        help="only measure anew which is faster, a tile of the table or which of cuBLASLt's kernels",
    )
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")


def run(arguments: argparse.Namespace) -> int:
    """Measure what was asked for; the exit status."""
    asked, dtype = _shapes(arguments)
    if arguments.out is not None:
        _check_file(arguments.out, f"--out {arguments.out}")
    bench = connect(dtype)
    try:
        path = arguments.out or tiles.tuned(bench.card.gpu)
        _check_file(path, f"BATCH_INVARIANT_CACHE={certificates.folder()}")
        # torch does not run our kernel, so another version of it measures the same
        facts = {name: value for name, value in asdict(bench.card).items() if name != "torch"} | {"dtype": dtype}
        kept = None
        if arguments.keep_tiles:
            kept = tiles.table_of(bench.card.gpu, bench.card.capability)
            if kept is None:
                raise BadInput(f"--keep-tiles: there is no table for {bench.card.gpu}; without it one is made")
        journal = Journal(path.with_suffix(".kept.jsonl" if kept else ".jsonl"), facts, arguments.fresh)
        try:
            return _tune(Run(bench, journal, asked, arguments.max_tokens, arguments.seconds, kept=kept), path, dtype)
        finally:
            journal.close()
    except Unusable as error:
        raise BadInput(str(error)) from None
    except (OtherBits, Broken, NothingRan) as error:
        what = "other bits, which no tile may give: " if isinstance(error, OtherBits) else ""
        print(f"tune: {what}{error}; no table was written", file=sys.stderr)
        return 1
    finally:
        bench.close()


def connect(dtype: str) -> Bench:
    """The GPU at hand.

    Raises:
        BadInput: there is none.
    """
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise BadInput("torch sees no NVIDIA GPU here: tiles are measured on the card that is to run them")
    try:
        return Bench(dtype)
    except Broken as error:
        raise BadInput(f"the GPU cannot be used: {error}") from None


def _tune(tune: Run, path: Path, dtype: str) -> int:
    card, journal = tune.bench.card, tune.journal
    versions = ", ".join(f"{name} {getattr(card, name)}" for name in ("driver", "torch", "triton"))
    print(f"{card.gpu}, {versions}", flush=True)
    if known := len(tune.points) - len(tune.missing):
        print(f"{known} of {len(tune.points)} points are in {journal.path}; --fresh measures them anew", flush=True)
    progress = Progress([weight(point) for point in tune.missing])

    def said(text: str) -> None:
        progress.clear()
        print(text, flush=True)

    start = time.monotonic()
    try:
        tune.go(lambda part, point, done, total: progress.update(part, f"{point}, tiles", done, total), said)
    except KeyboardInterrupt:
        kept = sum(point in journal.found for point in tune.points)
        said(f"stopped: {kept} of {len(tune.points)} points are kept in {journal.path}; the same command goes on")
        return 130
    finally:
        progress.clear()
    table, found = tune.table(), journal.found
    ratio = bands.over_fixed(found[point] for point in tune.points if point in found)
    about: dict[str, Any] = {"driver": card.driver, "torch": card.torch, "triton": card.triton, "dtype": dtype}
    about |= {"date": time.strftime("%Y-%m-%d", time.gmtime()), "over_fixed_tile": ratio and round(ratio, 3)}
    shipped = tiles.shipped(tiles.slug(card.gpu))
    if shipped.is_file() and shipped.resolve() != path.resolve():
        about["base"] = tiles.slug(card.gpu)  # whose shapes a server has, too
    told = measurements({point: what for point, what in found.items() if (point.n, point.k) in table.shapes})
    write_whole(path, _text(tiles.content_of(table, **about, measured=told)) + "\n")
    tried = sum(len(found[point].times) for point in tune.missing if point in found)
    skipped = sum(found[point].skipped for point in tune.missing if point in found)
    much = "" if ratio is None else f", on average {ratio:.2f} of the fixed tile's time"
    print(f"{path}: {len(table.shapes)} shapes, {len(table.tiles())} tiles{much}")
    print(f"{tried} measured, all with the fixed tile's bits; {skipped} skipped, in {clock(time.monotonic() - start)}")
    return 0


def _text(value: Any, indent: str = "") -> str:
    """JSON with one line for each band, so that two tables can be compared by eye and by diff."""
    if isinstance(value, dict) and any(isinstance(part, list) and part[:1] and isinstance(part[0], dict)
                                       for part in value.values()):  # fmt: skip
        inner = [f"{indent}  {json.dumps(name)}: {_text(part, indent + '  ')}" for name, part in value.items()]
        return "{\n" + ",\n".join(inner) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"{indent}  {_text(part, indent + '  ')}" for part in value) + f"\n{indent}]"
    return json.dumps(value)


def _shapes(arguments: argparse.Namespace) -> tuple[list[tuple[int, int]], str]:
    """(N, K) of the layers, and the name of their type."""
    checks.above_zero(arguments, "max_tokens", "tensor_parallel_size")
    if not LEAST_SECONDS <= arguments.seconds < math.inf:
        raise BadInput(f"--seconds {arguments.seconds:g}: a number from {LEAST_SECONDS:g} on is needed")
    layers, own = shapes.of(arguments)
    dtype = arguments.dtype or str(own).removeprefix("torch.")
    if dtype not in DTYPES:
        raise BadInput(f"--model {arguments.model}: tables are for 16-bit types, its own is {dtype}; name a --dtype")
    return [(layer.n, layer.k) for layer in layers], dtype


def _check_file(path: Path, given: str) -> None:
    """BadInput where a table cannot be written; asked before the work, not after it."""
    if path.suffix != ".json" or path.is_dir():
        raise BadInput(f"{given}: the name of a file that ends in .json is needed")
    if not checks.can_hold_files(path.parent):
        raise BadInput(f"{given}: a table cannot be kept in {path.parent}; name a folder to write in")
