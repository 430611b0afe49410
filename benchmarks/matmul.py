#!/usr/bin/env python3
"""Time of y = x[M, K]·W[N, K]ᵀ over M, each implementation against cuBLAS as shipped, interleaved in one run.

What has to be set before cuBLAS's first handle differs between implementations, so each environment has a worker
process of its own; they are asked in turn, shape by shape, each round beginning with another. A time is one CUDA graph
replay of many calls, divided by their number; the calls rotate through copies of the weights that together exceed the
L2 cache, as a model's layers do, and, up to 512 rows, each time through them with x at another place: what few
microseconds take goes by where operands lie. An error is ‖y - r‖ / ‖r‖ for the first rows, r in fp64 of the same
operands.

    python3 benchmarks/matmul.py --out benchmarks/results/matmul.csv [--quick] [--models llama-3.1-8b ...]

`vllm-0.33` is measured where a package `peer` with vLLM's batch-invariant GEMM is on the path, and left out otherwise.
"""

import argparse
import csv
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "llama-3.1-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
    "qwen3-8b": [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096)],
    "qwen2.5-0.5b": [(1152, 896), (896, 896), (9728, 896), (896, 4864), (151936, 896)],
    "llama-70b-tp8": [(1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584), (16032, 8192)],
}
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
QUICK_SIZES = (1, 8, 16, 64, 128, 192, 512, 2048, 8192)
BANDS = {"M <= 64": (1, 64), "64 < M < 256": (65, 255), "M >= 256": (256, 10**9)}
SHIPPED = "cublas as shipped"
KIT_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
IMPLEMENTATIONS = {SHIPPED: "shipped", "auto": "kit", "triton": "kit", "thinking-machines": "kit", "vllm-0.33": "kit"}
DTYPES = {"bf16": ("bfloat16", 2), "fp16": ("float16", 2), "fp32": ("float32", 4), "tf32": ("float32", 4)}
"""torch's name, and bytes of an element. tf32: torch's switch asks all implementations for that, else for IEEE."""
LARGEST_OUTPUT = 2**30
ROUNDS = 5
CHECKED = 16
"""Rows of which the error is taken."""
REPLAYS = 5
PLACES, PLACED_ROWS = 4, 512
"""Of x in memory, and up to which M."""


def implementation(name, dtype):
    """A function of (x, w) for one name; imported in the worker alone, after its environment was set."""
    import torch

    if IMPLEMENTATIONS[name] == "kit":
        from batch_invariant_ops import vendor
        from batch_invariant_ops.ops import linear, matmul

        vendor.prepare()
    precision = "tf32" if dtype == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    if name == SHIPPED:
        return torch.nn.functional.linear
    if name == "auto":
        return linear.linear
    if name == "triton":
        return lambda x, w: matmul.gemm(x, w.t())
    if name == "thinking-machines":
        from baselines import matmul_one_tile

        return lambda x, w: matmul_one_tile(x, w.t(), precision)
    import peer.batch_invariant as peer

    peer._resolve_block_sizes()
    return lambda x, w: peer.matmul_persistent(x, w.t())


class Case:
    """One (implementation, M, N, K): a captured graph of calls over rotating weights."""

    def __init__(self, name, m, dtype, weights):
        import torch

        run = implementation(name, dtype)
        generator = torch.Generator(device="cuda").manual_seed(m)
        x = torch.randn(m, weights[0].shape[1], device="cuda", generator=generator).to(weights[0].dtype)
        # the graph reads them, but does not keep them
        self.places = [x, *(x.clone() for _ in range(PLACES - 1))] if m <= PLACED_ROWS else [x]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # which is still writing x
        with torch.cuda.stream(stream), torch.no_grad():
            for w in weights[:2]:
                run(x, w)
            exact = x[:CHECKED].double() @ weights[0].double().t()
            self.error = float((run(x, weights[0])[:CHECKED].double() - exact).norm() / exact.norm())
        del exact
        torch.cuda.synchronize()
        self.calls = len(weights) * len(self.places)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph), torch.no_grad():
            for x in self.places:
                for w in weights:
                    run(x, w)
        self.graph.replay()
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def microseconds(self):
        import torch

        times = []
        for _ in range(REPLAYS):
            self.events[0].record()
            self.graph.replay()
            self.events[1].record()
            torch.cuda.synchronize()
            times.append(self.events[0].elapsed_time(self.events[1]) * 1e3 / self.calls)
        return statistics.median(times)


def worker():
    """Answer the parent's questions, one JSON object a line: make weights, make cases, time them."""
    import torch

    weights, cases = [], {}
    for line in sys.stdin:
        ask = json.loads(line)
        answer = None
        if ask["do"] == "shape":
            cases.clear()
            weights.clear()
            l2 = torch.cuda.get_device_properties(0).L2_cache_size
            dtype, itemsize = DTYPES[ask["dtype"]]
            copies = max(2, math.ceil(3 * l2 / (ask["n"] * ask["k"] * itemsize)))
            generator = torch.Generator(device="cuda").manual_seed(0)
            for _ in range(min(copies, 64)):
                w = torch.randn(ask["n"], ask["k"], device="cuda", generator=generator) * 0.02
                weights.append(w.to(getattr(torch, dtype)))
        elif ask["do"] == "case":
            cases.clear()
            for name in ask["names"]:
                cases[name] = Case(name, ask["m"], ask["dtype"], weights)
            answer = {name: case.error for name, case in cases.items()}
        elif ask["do"] == "time":
            answer = cases[ask["name"]].microseconds()
        elif ask["do"] == "versions":
            import triton

            answer = {
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "cublas": torch.version.cuda,
            }
        print(json.dumps(answer), flush=True)


class Worker:
    """A worker process in one environment, asked synchronously."""

    def __init__(self, environment):
        env = {k: v for k, v in os.environ.items() if k not in KIT_ENVIRONMENT}
        env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), env.get("PYTHONPATH", "")])}
        if environment == "kit":
            env |= KIT_ENVIRONMENT
        command = [sys.executable, __file__, "--worker"]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"matmul: a worker stopped at {question}")
        return json.loads(line)


def measure(shapes, sizes, dtypes, all_names):
    """Rows of the CSV, for a case at a time those of all implementations."""
    workers = {environment: Worker(environment) for environment in dict.fromkeys(IMPLEMENTATIONS[n] for n in all_names)}
    versions = workers["shipped"].ask(do="versions")
    for dtype in dtypes:
        itemsize = DTYPES[dtype][1]
        names = [name for name in all_names if name != "vllm-0.33" or itemsize == 2]  # it has no tiles for others
        for model, n, k in shapes:
            for one in workers.values():
                one.ask(do="shape", n=n, k=k, dtype=dtype)
            for m in (size for size in sizes if size * n <= LARGEST_OUTPUT):
                errors = {}
                for environment, one in workers.items():
                    of_it = [name for name in names if IMPLEMENTATIONS[name] == environment]
                    errors |= one.ask(do="case", m=m, dtype=dtype, names=of_it)
                times = defaultdict(list)
                for turn in range(ROUNDS):
                    for name in names[turn % len(names) :] + names[: turn % len(names)]:
                        times[name].append(workers[IMPLEMENTATIONS[name]].ask(do="time", name=name))
                rows = []
                for name in names:
                    us = statistics.median(times[name])
                    rows.append({
                        **versions, "model": model, "dtype": dtype, "n": n, "k": k, "m": m, "implementation": name,
                        "us": round(us, 3), "us_min": round(min(times[name]), 3), "us_max": round(max(times[name]), 3),
                        "ratio": round(us / statistics.median(times[SHIPPED]), 4),
                        "tflops": round(2 * m * n * k / us * 1e-6, 2),
                        "gb_per_s": round(itemsize * (m * k + n * k + m * n) / us * 1e-3, 1),
                        "error": f"{errors[name]:.6g}",
                    })  # fmt: skip
                yield rows
    for one in workers.values():
        one.process.stdin.close()
        one.process.wait()


def case(row):
    """What one row has in common with those of the other implementations."""
    return tuple(row[key] for key in ("dtype", "n", "k", "m"))


def summary(rows):
    """Per implementation and band of M: geometric mean and worst of the ratio to cuBLAS as shipped; the errors'.

    Of several dtypes each has its own.
    """
    result = defaultdict(dict)
    shipped = {case(row): float(row["error"]) for row in rows if row["implementation"] == SHIPPED}
    one_dtype = len({row["dtype"] for row in rows}) == 1
    alike = defaultdict(list)
    for row in rows:
        alike[row["implementation"] if one_dtype else f"{row['implementation']}, {row['dtype']}"].append(row)
    for name, of_it in alike.items():
        for band, (low, high) in BANDS.items():
            ratios = [float(row["ratio"]) for row in of_it if low <= int(row["m"]) <= high]
            if ratios:
                mean = math.exp(statistics.fmean(math.log(r) for r in ratios))
                result[name][band] = {"geometric_mean": round(mean, 4), "worst": max(ratios), "cases": len(ratios)}
        errors = [float(row["error"]) / shipped[case(row)] for row in of_it]
        result[name]["error"] = {"median": round(statistics.median(errors), 4), "worst": round(max(errors), 4)}
    return dict(result)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/matmul.csv", help="the CSV to write")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="whose shapes to measure")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["bf16"], metavar="DTYPE", help=", ".join(DTYPES)
    )
    parser.add_argument("--quick", action="store_true", help=f"M = {QUICK_SIZES} alone")
    arguments = parser.parse_args()
    if arguments.worker:
        return worker()
    names = [n for n in IMPLEMENTATIONS if n != "vllm-0.33" or importlib.util.find_spec("peer")]
    shapes = list({(n, k): (model, n, k) for model in arguments.models for n, k in SHAPES[model]}.values())
    sizes = QUICK_SIZES if arguments.quick else SIZES
    rows = []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        for alike in measure(shapes, sizes, arguments.dtypes, names):
            if not rows:
                writer = csv.DictWriter(file, alike[0])
                writer.writeheader()
            rows += alike
            writer.writerows(alike)
            file.flush()
            ratios = "  ".join(f"{row['implementation']} {row['ratio']:.2f}" for row in alike)
            print("{dtype} N={n} K={k} M={m}: ".format(**alike[0]) + ratios, flush=True)
    found = summary(rows)
    about = {key: rows[0][key] for key in ("gpu", "torch", "triton", "cublas")}
    text = json.dumps({**about, "ratio_to": SHIPPED, "bands": found}, indent=2)
    arguments.out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    for name, bands in found.items():
        of = {band: bands[band] for band in BANDS if band in bands}
        print(f"{name:26}", *(f"{b}: {v['geometric_mean']:.2f} ({v['worst']:.2f})" for b, v in of.items()), sep="  ")


if __name__ == "__main__":
    main()
