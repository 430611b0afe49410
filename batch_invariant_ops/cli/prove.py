"""Compare the vendor's GEMM with the bits to keep, over numbers of rows M, and say where it may run.

On a GPU the bits to keep are those of this package's Triton kernel: where the vendor's are the same, a server runs the
vendor's. On a CPU they are the vendor's own at the largest M, and what is found is the floor below which it differs.

A sample of M, as a server makes at its start, takes a second. --exhaustive compares every M and keeps certificates,
which a server then uses, in $BATCH_INVARIANT_CACHE or ~/.cache/batch_invariant.

Exit status: 0 where the vendor may run for every layer, 1 where it may not for some, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from batch_invariant_ops import certificates, proving, vendor
from batch_invariant_ops.certificates import Case, Certificate
from batch_invariant_ops.cli import checks, shapes
from batch_invariant_ops.cli.errors import BadInput
from batch_invariant_ops.cli.progress import Progress
from batch_invariant_ops.proof import window_of

CPU_LARGEST = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's flags."""
    shapes.add_arguments(parser)
    parser.add_argument("--dtype", nargs="+", choices=shapes.DTYPES, help="default: the model's, else bfloat16")
    parser.add_argument("--bias", action="store_true", help="with --shapes: the layers have a bias")
    parser.add_argument("--exhaustive", action="store_true", help="compare every M, and keep certificates")
    parser.add_argument("--max-tokens", type=int, metavar="M", help="the largest M (8192; on a CPU 128)")
    parser.add_argument("--max-seqs", type=int, default=1024, metavar="M", help="the largest M of lm_head (1024)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU, where there is one")
    parser.add_argument("--json", metavar="FILE", help="write the result there, too; - for standard output")


def run(arguments: argparse.Namespace) -> int:
    """Prove what was asked for; the exit status."""
    vendor.set_environment()  # before torch is asked for its device, which may make CUDA's first handle
    device = _device(arguments.device)
    cases = _cases(arguments, device)
    if device.type == "cuda":
        vendor.prepare()
    if arguments.exhaustive:
        _check_folder(certificates.folder())
    if arguments.json not in (None, "-"):
        _write(arguments.json, {})
    text = sys.stderr if arguments.json == "-" else sys.stdout
    machine = certificates.machine(device)
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None), file=text)
    start = time.perf_counter()
    results = []
    progress = Progress([float(case.n) * case.k * largest**2 for _, case, largest in cases])
    for part, (name, case, largest) in enumerate(cases):
        result = _prove(part, name, case, device, largest, arguments.exhaustive, progress)
        progress.clear()
        results.append(result)
        print(f"{name:>13} {case}: {_said(result, device)}", file=text, flush=True)
    seconds = time.perf_counter() - start
    proven = sum(result["window"] is not None for result in results)
    others = "its other sizes run one constant number of rows" if device.type == "cpu" else "others run on our kernel"
    print(f"{proven} of {len(results)} proven in {seconds:.1f} s" + ("" if proven == len(results) else f"; {others}, "
          "with bits as invariant"), file=text)  # fmt: skip
    if arguments.exhaustive:
        print(f"certificates kept in {certificates.folder()}", file=text)
    if arguments.json:
        _write(arguments.json, {"machine": machine, "seconds": round(seconds, 2), "results": results})
    return 0 if proven == len(results) else 1


def _prove(
    part: int, name: str, case: Case, device: torch.device, largest: int, exhaustive: bool, progress: Progress
) -> dict[str, Any]:
    def told(done: int, total: int) -> None:
        # the largest M come first, and cost as their square
        share = 1 - (1 - done / total) ** 2 if exhaustive else done / total
        progress.update(part, f"{name} {case}", done, total, share)

    start = time.perf_counter()
    try:
        if exhaustive:
            certificate = proving.exhaustively(case, device, largest, told)
            certificates.save(case, device, certificate)
        else:
            sizes = proving.sizes_of(case, device, largest=largest)
            verdicts = proving.compare(case, device, sizes, told)
            disagree = tuple((size, size) for size, agrees in zip(sizes, verdicts, strict=True) if not agrees)
            window = window_of(sizes, verdicts, proving.LARGEST_FLOOR)
            certificate = Certificate(sizes[-1], disagree, window, time.perf_counter() - start)
    except torch.OutOfMemoryError:
        raise BadInput(f"{name} {case}: too little memory for M = {largest}; give a smaller --max-tokens") from None
    return {
        "layer": name, **case.facts(), "exhaustive": exhaustive, "largest": certificate.largest,
        "window": certificate.window and asdict(certificate.window), "disagree": certificate.disagree,
        "seconds": round(certificate.seconds, 2),
    }  # fmt: skip


def _said(result: dict[str, Any], device: torch.device) -> str:
    window, seconds = result["window"], f"{result['seconds']:.1f} s"
    scope = "every M" if result["exhaustive"] else "a sample of M"
    ranges = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in result["disagree"])
    if window is None:
        return f"not proven over {scope} up to {result['largest']}: other bits at M = {ranges} ({seconds})"
    floor = f"; fewer than {window['floor']} rows are padded" if window["floor"] > 1 else ""
    whose = "one row's bits" if device.type == "cpu" else "our kernel's bits"
    return f"{whose} at {scope} from {window['floor']} to {window['cap']}{floor} ({seconds})"


def _device(asked_for: str | None) -> torch.device:
    if asked_for == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no GPU here")
    if asked_for == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _cases(arguments: argparse.Namespace, device: torch.device) -> list[tuple[str, Case, int]]:
    """(layer's name, GEMM, largest M), without repetitions."""
    checks.above_zero(arguments, "max_tokens", "max_seqs", "tensor_parallel_size")
    if arguments.model is not None and arguments.bias:
        raise BadInput("--bias goes with --shapes: a model's config.json says which of its layers have one")
    layers, own_dtype = shapes.of(arguments)
    largest = arguments.max_tokens or (CPU_LARGEST if device.type == "cpu" else 8192)
    cases: dict[Case, tuple[str, int]] = {}
    for dtype in [shapes.DTYPES[name] for name in arguments.dtype or []] or [own_dtype]:
        for layer in layers:
            case = Case(layer.n, layer.k, dtype, layer.has_bias or arguments.bias)
            rows = min(largest, arguments.max_seqs) if layer.on_samples else largest
            cases.setdefault(case, (layer.name, max(1, min(rows, proving.LARGEST_OUTPUT // layer.n))))
    return [(name, case, rows) for case, (name, rows) in cases.items()]


def _check_folder(folder: Path) -> None:
    """BadInput where certificates could not be kept; asked before the work, not after it."""
    if not checks.can_hold_files(folder):
        raise BadInput(f"BATCH_INVARIANT_CACHE={folder}: certificates cannot be kept there; name a folder to write in")


def _write(file: str, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    if file == "-":
        sys.stdout.write(text)
        return
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--json {file}: {error.strerror or error}") from error
