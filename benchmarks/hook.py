#!/usr/bin/env python3
"""What the import hook adds to a Python process that never imports vLLM: `python -c pass` with it and without.

Every process in the image pays it, a health check and `pip list` included. Each round runs all cases in a random
order; what is added is the median over rounds of a case's time less that of the case without the hook in the same
round, with the 95 % confidence interval of that median. Prints it and writes benchmarks/results/hook.csv.
"""

import argparse
import csv
import math
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOOK = ROOT / "vllm"
LIMIT_MS = 2.0
WITHOUT = "without the hook"


def cases(folder):
    """By name, what the environment has beyond the plain one."""
    shutil.copy(HOOK / "sitecustomize.py", folder)
    return {
        WITHOUT: {},
        "with it": {"PYTHONPATH": str(HOOK), "BATCH_INVARIANT": "1"},
        "with it, switched off": {"PYTHONPATH": str(HOOK)},
        "with it, never compiled": {"PYTHONPATH": folder, "BATCH_INVARIANT": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    }


def run(environment):
    """Milliseconds that one `python -c pass` takes: by the clock, and of the processor."""
    command = [sys.executable, "-c", "pass"]
    start = time.perf_counter_ns()
    process = os.posix_spawn(command[0], command, environment)
    _, status, used = os.wait4(process, 0)
    wall = time.perf_counter_ns() - start
    if status:
        raise SystemExit(f"hook: `python -c pass` ended with status {os.waitstatus_to_exitcode(status)}")
    return wall * 1e-6, (used.ru_utime + used.ru_stime) * 1e3


def median_interval(values):
    """(median, low, high): the median and its 95 % confidence interval, from the order of the values alone."""
    ordered, n = sorted(values), len(values)
    half = 0.98 * math.sqrt(n)  # 1.96 standard deviations of a binomial count at one half
    low, high = max(0, math.floor(n / 2 - half)), min(n - 1, math.ceil(n / 2 + half))
    return statistics.median(ordered), ordered[low], ordered[high]


def measure(rounds):
    """By case, (wall, processor) milliseconds in every round."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "BATCH_", "VLLM_"))}
    shuffle = random.Random(0).shuffle
    with tempfile.TemporaryDirectory() as folder:
        environments = {name: plain | extra for name, extra in cases(folder).items()}
        times = {name: [] for name in environments}
        for number in range(-3, rounds):  # the first three warm the page cache and compile the hook
            order = list(environments)
            shuffle(order)
            for name in order:
                found = run(environments[name])
                if number >= 0:
                    times[name].append(found)
    return times


def rows(times):
    """Rows of the CSV, one a case."""
    for name, values in times.items():
        row = {"case": name, "python": platform.python_version(), "cpus": os.cpu_count(), "rounds": len(values)}
        for clock, index in (("wall", 0), ("cpu", 1)):
            added = [one[index] - base[index] for one, base in zip(values, times[WITHOUT], strict=True)]
            figures = zip(("", "_low", "_high"), median_interval(added), strict=True)
            row[f"{clock}_ms"] = round(statistics.median(one[index] for one in values), 3)
            row |= {f"added_{clock}_ms{suffix}": round(figure, 3) for suffix, figure in figures}
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, metavar="N", help="(default: 300)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/hook.csv", help="the CSV to write")
    arguments = parser.parse_args()
    found = list(rows(measure(arguments.rounds)))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)
    for row in found:
        interval = f"{row['added_wall_ms_low']:+.3f} to {row['added_wall_ms_high']:+.3f}"
        added = "" if row["case"] == WITHOUT else f"  {row['added_wall_ms']:+.3f} ms ({interval})"
        print(f"{row['case']:<25}{row['wall_ms']:8.3f} ms{added}")
    added = next(row["added_wall_ms"] for row in found if row["case"] == "with it")
    print(f"the hook adds {added:.2f} ms, {added / LIMIT_MS:.0%} of the {LIMIT_MS:g} ms that it may")


if __name__ == "__main__":
    main()
