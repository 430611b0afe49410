#!/usr/bin/env python3
"""Draw the pictures that the documentation shows, from the committed results alone.

    python benchmarks/plot.py            every picture
    python benchmarks/plot.py proof      one of them

`proof` reads the harness's reports in docs/evidence/demo-h100/ and writes docs/images/proof.svg. The other pictures are
drawn where their results are in benchmarks/results/: `matmul` (ratio to cuBLAS against M), `matmul_shares` (of what the
card can), `serving` (ratio to plain vLLM by workload), `cpu_serving` and `harness`.
"""

import argparse
import csv
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from serving import CONTEXTS, WORKLOADS

matplotlib.use("svg")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
GREY, ORANGE, BLUE, GREEN = "#8a8f98", "#d9772b", "#3d8bd4", "#3a9d5d"
H200_GB_PER_S, H200_TFLOPS = 4300, 790
"""What an H200 was seen to reach: a large copy, reads and writes together, and a large matrix product in bf16."""
WHOLE = 32
"""Layers of Llama-3.1-8B."""
STYLE = {
    "svg.hashsalt": "batch-invariant",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}


def save(figure, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    print(IMAGES.relative_to(ROOT) / f"{name}.svg")


def proof() -> None:
    """How far logprobs moved under load, and how long the same work took, for three servers of one model."""
    folder = ROOT / "docs" / "evidence" / "demo-h100"
    servers = {
        "vLLM as shipped": ("plain", ORANGE),
        "vLLM's own\nbatch-invariant mode": ("vllm-own-mode", GREY),
        "this kit": ("batch-invariant", BLUE),
    }
    reports = {name: json.loads((folder / f"{file}.json").read_text()) for name, (file, _) in servers.items()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 2.9), layout="constrained", width_ratios=(3, 2))
    floor = min(x for r in reports.values() for x in r["logprob_differences"] if x > 0) / 10
    for row, (name, (_, colour)) in enumerate(servers.items()):
        values = [value or floor for value in reports[name]["logprob_differences"]]
        heights = [row + (i * 0.618034 % 1 - 0.5) * 0.6 for i in range(len(values))]
        left.scatter(values, heights, s=6, color=colour, alpha=0.6, linewidths=0)
        same = f"{reports[name]['identical_to_solo']} of {reports[name]['requests']} identical"
        left.annotate(same, (1.0, row - 0.36), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
    left.set_xscale("log")
    left.set_yticks(range(len(servers)), list(servers))
    left.set_ylim(len(servers) - 0.5, -0.6)
    powers = [p for p in range(-9, 1) if floor * 3 < 10.0**p < 1]
    left.set_xticks([floor, *(10.0**p for p in powers)], ["0", *(f"1e{p}" for p in powers)])
    left.minorticks_off()
    left.set_xlabel("largest logprob difference, under load against alone; a point a request")
    for offset, (key, label) in enumerate((("solo_seconds", "alone"), ("loaded_seconds", "under load"))):
        base = reports["vLLM as shipped"][key]
        ratios = [report[key] / base for report in reports.values()]
        bars = right.barh(
            [row + (offset - 0.5) * 0.36 for row in range(len(servers))], ratios, height=0.32,
            color=[colour for _, colour in servers.values()], alpha=1.0 if offset else 0.55,
        )  # fmt: skip
        right.bar_label(bars, [f"{ratio:.2f}  {label}" for ratio in ratios], padding=3, fontsize=9)
    right.set_yticks([])
    right.set_ylim(len(servers) - 0.5, -0.6)
    right.set_xlim(0, 3.2)
    right.set_xlabel("time ÷ vLLM as shipped, one run")
    save(figure, "proof")


GEMM_COLOURS = {
    "cublas as shipped": "black",
    "auto": BLUE,
    "triton": GREEN,
    "vllm-0.33": ORANGE,
    "thinking-machines": GREY,
}


def gemms(name: str) -> list[dict]:
    """The rows of one run of matmul.py in bf16; none where there is no such file."""
    path = RESULTS / f"{name}.csv"
    if not path.is_file():
        return []
    return [row for row in csv.DictReader(path.open(encoding="utf-8")) if row["dtype"] == "bf16"]


def by_rows(rows: list[dict], key: str) -> dict[str, dict[int, float]]:
    """The geometric mean of one column over all shapes, by implementation and M."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["implementation"]][int(row["m"])].append(math.log(float(row[key])))
    return {
        name: {m: math.exp(statistics.fmean(values)) for m, values in sorted(by_m.items())}
        for name, by_m in found.items()
    }


def matmul() -> None:
    """Each implementation's time over cuBLAS as shipped against M, the geometric mean over all shapes of each CSV."""
    runs = [rows for name in ("matmul", "matmul-h100") if (rows := gemms(name))]
    if not runs:
        return
    figure, axes = plt.subplots(
        1, len(runs), figsize=(4.8 * len(runs), 3.2), layout="constrained", sharey=True, squeeze=False
    )
    for side, rows in zip(axes[0], runs, strict=True):
        for name, ratios in by_rows(rows, "ratio").items():
            if name != "cublas as shipped":
                side.plot([*ratios], [*ratios.values()], color=GEMM_COLOURS[name], label=name, marker=".")
        side.axhline(1, color="black", linewidth=0.8)
        side.set_xscale("log", base=2)
        side.set_ylim(bottom=0)
        side.set_xlabel("M, rows")
        side.set_title(rows[0]["gpu"], fontsize=10)
    axes[0][0].set_ylabel("time ÷ cuBLAS as shipped")
    axes[0][0].legend(frameon=False)
    save(figure, "matmul")


def matmul_shares() -> None:
    """How near each comes to what an H200 can: of its bandwidth where there are few rows, of its arithmetic beyond."""
    rows = [row for row in gemms("matmul") if int(row["n"]) * int(row["k"]) >= 2**24]
    if not rows:
        return
    figure, sides = plt.subplots(1, 2, figsize=(9.6, 3.2), layout="constrained")
    wanted = ((sides[0], "gb_per_s", H200_GB_PER_S, range(1, 65)), (sides[1], "tflops", H200_TFLOPS, range(64, 8193)))
    for side, key, ceiling, sizes in wanted:
        for name, values in by_rows(rows, key).items():
            shown = {m: 100 * value / ceiling for m, value in values.items() if m in sizes}
            side.plot([*shown], [*shown.values()], color=GEMM_COLOURS[name], label=name, marker=".")
        side.set_xscale("log", base=2)
        side.set_ylim(0, 105)
        side.set_xlabel("M, rows")
        side.set_ylabel(f"% of {ceiling:,} {'GB/s' if key == 'gb_per_s' else 'TFLOP/s'}")
    figure.suptitle(f"{rows[0]['gpu']}, weights of 32 MiB and more", fontsize=10)
    sides[1].legend(frameon=False)
    save(figure, "matmul_shares")


def serving() -> None:
    """Time over plain vLLM's by workload, of each release: by the clock where the model was whole, else the GPU's.

    With few layers the clock is the host's.
    """
    path = RESULTS / "serving.json"
    if not path.is_file():
        return
    releases = json.loads(path.read_text(encoding="utf-8"))["releases"]
    panels = []
    for release, found in releases.items():
        whole = found["layers"] == WHOLE
        key, what = ("ratio", "time") if whole else ("gpu_ratio", "GPU time")
        for names, title in ((WORKLOADS, what), (CONTEXTS, "time of a token")):
            chosen = {
                name: {system: entry[key] for system, entry in found["workloads"][name].items()}
                for name in names
                if key in found["workloads"].get(name, {}).get("plain", {})
            }
            if chosen:
                panels.append((f"vLLM {release}, {found['layers']} layers, {found['gpu']}: {title}", chosen))
    lines = -(-len(panels) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(9.2, 2.7 * lines), layout="constrained", sharey=True, squeeze=False)
    sides = [side for line in axes for side in line]
    for side in sides[len(panels) :]:
        side.set_visible(False)
    systems = {"vllm-own-mode": ("vLLM's own batch-invariant mode", GREY), "kit": ("this kit", BLUE)}
    for side, (title, workloads) in zip(sides, panels, strict=False):
        for offset, (system, (label, colour)) in enumerate(systems.items()):
            ratios = {place: one[system] for place, one in enumerate(workloads.values()) if system in one}
            places = [place + (offset - 0.5) * 0.38 for place in ratios]
            bars = side.bar(places, [*ratios.values()], 0.36, color=colour, label=label)
            side.bar_label(bars, fmt="%.2f", fontsize=8)
        side.axhline(1, color="black", linewidth=0.8)
        side.set_xticks(range(len(workloads)), [*workloads])
        side.set_title(title, fontsize=10)
        side.set_ylabel("÷ vLLM as shipped")
    sides[0].legend(frameon=False, fontsize=9)
    save(figure, "serving")


def cpu_serving() -> None:
    """The demo's two servers in interleaved rounds: our time over the plain server's, a point a round."""
    path = RESULTS / "cpu_serving.csv"
    if not path.is_file():
        return
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    figure, axes = plt.subplots(figsize=(6, 1.8), layout="constrained")
    for place, key in enumerate(("solo_ratio", "loaded_ratio")):
        values = [float(row[key]) for row in rows if row[key]]
        axes.scatter(values, [place] * len(values), color=BLUE, alpha=0.5, s=18)
        axes.vlines(statistics.median(values), place - 0.3, place + 0.3, color="black")
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_yticks((0, 1), ("alone", "under load"))
    axes.set_ylim(1.6, -0.6)
    axes.set_xlabel("time ÷ plain vLLM, a point a round; the bar is the median")
    save(figure, "cpu_serving")


def harness() -> None:
    """Requests a second that each tool drives at the same fake server, and its peak memory: medians of all rounds."""
    path = RESULTS / "harness.csv"
    if not path.is_file():
        return
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    tools = {"bench": "vllm bench serve", "harness": "harness, with logprobs"}
    figure, axes = plt.subplots(1, 2, figsize=(8, 1.4), layout="constrained", sharey=True)
    for side, key, label in ((axes[0], "rps", "requests a second"), (axes[1], "peak_mb", "peak memory, MB")):
        medians = [statistics.median(float(row[f"{tool}_{key}"]) for row in rows) for tool in tools]
        bars = side.barh(list(tools.values()), medians, color=(GREY, BLUE))
        side.bar_label(bars, [f"{value:,.0f}" for value in medians], padding=3, fontsize=9)
        side.set_xlim(0, max(medians) * 1.2)
        side.set_xlabel(label)
    axes[0].invert_yaxis()
    save(figure, "harness")


PICTURES = {
    "proof": proof, "matmul": matmul, "matmul_shares": matmul_shares, "serving": serving, "cpu_serving": cpu_serving,
    "harness": harness,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", help=f"of {', '.join(PICTURES)}; default: all")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.pictures if name not in PICTURES]
    if unknown:
        parser.error(f"pictures={unknown[0]!r} is not valid: one of {', '.join(PICTURES)} is needed")
    for name in arguments.pictures or PICTURES:
        with plt.rc_context(STYLE):
            PICTURES[name]()


if __name__ == "__main__":
    main()
