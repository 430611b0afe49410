#!/usr/bin/env python3
"""All that is to be shown on a GPU, in one command: tests, proofs, architectures and benchmarks, spread over the cards.

    python3 benchmarks/evidence.py --out docs/evidence/this-gpu [--only tests matmul] [--minutes 60]

Each job has a card to itself; the processors it shares, so that wall times of small batches are better measured with
one job at a time (--gpus 0). What a job prints is in OUT/JOB.txt below its command, the card, its driver and the
versions; the CSVs that it writes are beside it. OUT/summary.csv says how each ended: 0 is well, cut is a job that ran
into its limit, and nothing one whose tests were all skipped. The exit status is 1 where any did not end well. Needs
vLLM for all but the GEMM's jobs, and pytest.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "vllm"))

from local_server import Failure, Program, Programs, run_command  # noqa: E402
from matmul import SHAPES  # noqa: E402
from rounds import kept  # noqa: E402

PRESET, LAYERS = "llama-8b-8layers", 32
"""The served model: with these, all of Llama-3.1-8B's shapes."""
MODEL = "llama-8b"
LOOK_AGAIN = 0.25  # seconds
PACKAGES = ("vllm", "torch", "triton", "flashinfer-python")


@dataclass(frozen=True)
class Job:
    """A command of this repository after the name of Python, and the minutes after which it is ended.

    {out} in it is the folder that results go to, {model} that of the model, which is made first where it is named.
    A job that ended well has `shows` in its log: tests that were all skipped have shown nothing.
    """

    command: tuple[str, ...]
    minutes: float
    shows: str = ""

    @property
    def needs_model(self) -> bool:
        return any("{model}" in word for word in self.command)


def job(line: str, minutes: float, shows: str = "") -> Job:
    return Job(tuple(line.split()), minutes, shows)


def proof(model: str) -> Job:
    shapes = " ".join(f"{n},{k}" for n, k in SHAPES[model])
    return job(f"-m batch_invariant_ops prove --exhaustive --shapes {shapes} --json {{out}}/prove-{model}.json", 5)


JOBS = {
    "serving": job("benchmarks/serving.py --model {model} --kv-cache-gib 12 --out {out}", 20),
    # three rounds do not settle a 99th percentile
    "online": job("benchmarks/online.py --model {model} --kv-cache-gib 20 --rounds 8 --seconds 12 --out {out}", 25),
    "architectures": job("benchmarks/architectures.py --jobs 4 --out {out}/architectures.csv --logs {out}/engines", 20),
    "server-tests": job("-m pytest -rs tests -m server", 30, " passed"),
    "tests": job("-m pytest -rs tests/gpu -m gpu", 20, " passed"),
    "matmul": job("benchmarks/matmul.py --out {out}/matmul.csv", 10),
    "matmul-fp16": job("benchmarks/matmul.py --dtypes fp16 --quick --out {out}/matmul-fp16.csv", 5),
    "matmul-fp32": job("benchmarks/matmul.py --dtypes fp32 tf32 --quick --out {out}/matmul-fp32.csv", 10),
    **{f"prove-{model}": proof(model) for model in ("llama-3.1-8b", "qwen3-8b")},
    "serving-attention": job(
        "benchmarks/serving.py --model {model} --kv-cache-gib 12 --out {out}/serving-attention --rounds 3 "
        "--systems plain kit-triton kit-flex kit-flex-64",
        20,
    ),
    "attention": job(
        "benchmarks/architectures.py --only llama-head-128 mistral-window --attention TRITON_ATTN FLEX_ATTENTION "
        "--jobs 4 --out {out}/attention.csv --logs {out}/engines",
        15,
    ),
    "steps": job(
        "benchmarks/serving.py --model {model} --kv-cache-gib 12 --out {out}/steps --systems plain kit "
        "--workloads step-513 step-700 step-1040 step-2000",
        10,
    ),
    "starts": job("benchmarks/starts.py --model {model} --out {out}", 10, "PASS"),
    "contexts": job(
        "benchmarks/serving.py --model {model} --kv-cache-gib 20 --out {out}/contexts --rounds 3 "
        "--workloads 1x2k 1x8k 1x32k 1x64k 4x32k",
        15,
    ),
}
"""The longest first, so that no card idles while the last one ends."""


@dataclass
class Running:
    """A job on a card."""

    name: str
    program: Program
    gpu: str
    began: float
    ends: float


def cards() -> dict[str, str]:
    """Name and driver of each GPU that may be used, by its number.

    Raises:
        Failure: there is none.
    """
    command = ["nvidia-smi", "--query-gpu=index,name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        raise Failure(f"a GPU is needed, and nvidia-smi tells of none: {error}") from None
    found = dict(line.split(", ", 1) for line in lines)
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if wanted is None else {number: found[number] for number in wanted.split(",") if number in found}


def versions() -> str:
    found = ((name, next(iter(importlib.metadata.distributions(name=name)), None)) for name in PACKAGES)
    return ", ".join(f"{name} {distribution.version}" for name, distribution in found if distribution)


def start(programs: Programs, name: str, gpu: str, card: str, words: Sequence[str], log: Path) -> Program:
    """Begin a job, with what it ran on at the head of its log."""
    log.write_text(f"$ python3 {' '.join(words)}\n{card}; {versions()}\n\n", encoding="utf-8")
    shell = 'exec "$0" "$@" >> "$LOG" 2>&1'
    env = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "LOG": str(log), "PYTHONUNBUFFERED": "1"}
    return programs.start(name, ["sh", "-c", shell, sys.executable, *words], env)


def run(
    names: Sequence[str], gpus: dict[str, str], out: Path, model: Path, deadline: float
) -> Iterator[dict[str, Any]]:
    """Each job's row as it ends; those that no time was left for are cut before they begin."""
    waiting, free = list(names), list(gpus)
    running: list[Running] = []
    with Programs() as programs:
        while waiting or running:
            while waiting and free and time.monotonic() < deadline:
                name, gpu = waiting.pop(0), free.pop(0)
                words = [word.format(out=out, model=model) for word in JOBS[name].command]
                program = start(programs, name, gpu, gpus[gpu], words, out / f"{name}.txt")
                now = time.monotonic()
                running.append(Running(name, program, gpu, now, min(deadline, now + 60 * JOBS[name].minutes)))
            for one in [*running]:
                status, now = one.program.process.poll(), time.monotonic()
                if status is None and now < one.ends:
                    continue
                one.program.stop()
                running.remove(one)
                free.append(one.gpu)
                yield row(one.name, gpus[one.gpu], outcome(one.name, status, out), now - one.began)
            if time.monotonic() >= deadline:
                yield from (row(name, "", "cut", 0.0) for name in waiting)
                waiting = []
            time.sleep(LOOK_AGAIN)


def outcome(name: str, status: int | None, out: Path) -> str:
    if status is None:
        return "cut"
    if status == 0 and JOBS[name].shows not in (out / f"{name}.txt").read_text(encoding="utf-8", errors="replace"):
        return "nothing"
    return str(status)


def row(name: str, card: str, status: str, seconds: float) -> dict[str, Any]:
    print(f"{name:20} {status:>7} {seconds:7.0f} s", flush=True)
    return {"job": name, "gpu": card, "status": status, "seconds": f"{seconds:.0f}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS), metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--gpus", nargs="+", metavar="N", help="their numbers (default: all)")
    parser.add_argument("--minutes", type=float, default=120, help="after which all is ended (default: 120)")
    parser.add_argument("--model", type=Path, help=f"its folder (default: {MODEL}, made in OUT where a job needs it)")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    gpus = cards()
    if missing := [number for number in arguments.gpus or () if number not in gpus]:
        parser.error(f"--gpus {missing[0]} is not valid: {', '.join(gpus)} is there")
    gpus = {number: gpus[number] for number in arguments.gpus or gpus}
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    model = arguments.model or out / MODEL
    if any(JOBS[name].needs_model for name in arguments.only) and not model.is_dir():
        command = [sys.executable, str(ROOT / "vllm" / "tiny_model.py"), str(model), "--preset", PRESET]
        command += ["--layers", str(LAYERS)]
        if subprocess.run(command).returncode:
            raise Failure(f"the model could not be made in {model}")
    os.chdir(ROOT)
    ended = [row["status"] for row in kept(run(arguments.only, gpus, out, model, deadline), out / "summary.csv")]
    return int(any(status != "0" for status in ended))


if __name__ == "__main__":
    raise SystemExit(run_command("evidence", main))
