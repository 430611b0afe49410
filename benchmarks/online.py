#!/usr/bin/env python3
"""Online serving under Poisson arrivals: plain vLLM, vLLM's own batch-invariant mode and this kit, interleaved.

Each system is a real `vllm serve` on this machine with its own port and compile cache and a KV cache of a fixed size;
all stay up, and while one is measured the others idle. The load is vLLM's own `vllm bench serve`: random prompts,
greedy answers of a fixed length, the same prompts and arrival times for each system in a round. A burst against plain
vLLM gives its capacity in requests/s; the measured rates are fractions of that for all systems.

    python3 benchmarks/online.py --model .demo/llama-8b-8layers

writes online.csv (a line a run) and online.json to benchmarks/results/: by fraction and system, the median over the
rounds of each figure's ratio to plain vLLM's in the same round. Of times, below 1 is better; of throughputs, above 1.
One that is cut short keeps what it has. vLLM's CPU build has no such mode of its own, which is left out there.

The client needs cores of its own: one that falls behind reads several tokens at once, and a median ITL near 0 shows it.
The mean time of a request's tokens, whose median TPOT is, does not depend on that.
"""

import argparse
import importlib.metadata
import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "vllm"))

import demo  # noqa: E402
from local_server import (  # noqa: E402
    Failure,
    Program,
    Programs,
    die_with_parent,
    free_port,
    run_command,
    wait_until_ready,
)
from rounds import kept, processor  # noqa: E402
from serve import NOT_FOR_VLLM, SWITCHES_OF_THE_MODE, Installed, command, environment  # noqa: E402
from serve_settings import GPU_BACKENDS, Settings  # noqa: E402
from serving import ATTENTION, ENVIRONMENTS, KIT, MODE, OWN, PLAIN, channel_back  # noqa: E402

RUN_SECONDS = 600.0  # after which a run hangs
WARM_UP_SEED = 1_000_000  # of no round
# the CSV's names of vllm bench's
FIGURES = {
    "ttft_median_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "itl_median_ms": "median_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
    "tpot_median_ms": "median_tpot_ms",
    "requests_per_s": "request_throughput",
    "output_tokens_per_s": "output_throughput",
}


@dataclass(frozen=True)
class Load:
    """Requests of `input_len` tokens answered with `output_len`: `warm_up` of them, then `seconds` a run, about."""

    input_len: int
    output_len: int
    seconds: float
    warm_up: int


CPU = Load(input_len=64, output_len=16, seconds=10.0, warm_up=16)
GPU = Load(input_len=1024, output_len=128, seconds=20.0, warm_up=128)


class Client:
    """`vllm bench serve` in a process of its own, which imports vLLM once and not for every run."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--client"], env=client_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=output, text=True, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip

    def run(self, argv: list[str]) -> None:
        """One benchmark.

        Raises:
            Failure: it failed, or did not end.
        """
        self.process.stdin.write(json.dumps(argv) + "\n")
        self.process.stdin.flush()
        ended, _, _ = select.select([self.process.stdout], [], [], RUN_SECONDS)
        if not ended:
            raise Failure(f"vllm bench serve did not end within {RUN_SECONDS:.0f} s")
        line = self.process.stdout.readline()
        if not line or (why := json.loads(line)):
            raise Failure(f"vllm bench serve failed: {why if line else 'its process ended'}; {self.log} says more")

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()


def serve_clients(answers: TextIO) -> None:
    """What a client's process does: a line with a benchmark's arguments in, a line with what went wrong out."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for line in sys.stdin:
        why = ""
        try:
            bench(parser.parse_args(json.loads(line)))
        except (Exception, SystemExit) as error:  # whatever of vLLM's may fail
            traceback.print_exc()
            why = f"{type(error).__name__}: {error}"
        print(json.dumps(why), file=answers, flush=True)


@dataclass(frozen=True)
class Bench:
    """Runs of a client against servers."""

    client: Client
    model: str
    load: Load
    folder: Path

    def run(self, server: Program, port: int, prompts: int, rate: float, seed: int) -> dict:
        """vLLM's JSON of one run.

        Raises:
            Failure: a request failed, or the server or the client did.
        """
        result = self.folder / "result.json"
        result.unlink(missing_ok=True)
        argv = [
            *("--backend", "vllm", "--host", "127.0.0.1", "--port", str(port)),
            *("--model", "demo", "--tokenizer", self.model, "--temperature", "0", "--ignore-eos"),
            *("--dataset-name", "random", "--num-prompts", str(prompts)),
            *("--random-input-len", str(self.load.input_len), "--random-output-len", str(self.load.output_len)),
            *("--request-rate", str(rate), "--seed", str(seed)),
            *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99", "--disable-tqdm"),
            *("--save-result", "--result-dir", str(self.folder), "--result-filename", result.name),
        ]
        try:
            self.client.run(argv)
        except Failure as failure:
            if server.process.poll() is not None:
                raise Failure(f"{server.name}: it ended; the end of {server.log}:\n{server.last_lines()}") from None
            raise Failure(f"{server.name}: {failure}") from None
        found = json.loads(result.read_text(encoding="utf-8"))
        found["failed"] = prompts - found["completed"]
        if found["failed"]:
            raise Failure(
                f"{server.name}: {found['failed']} of {prompts} requests failed at {rate:.2f} requests/s; "
                f"{self.client.log} says why"
            )
        return found


def client_env() -> dict[str, str]:
    """The client's environment: the mode's switches are the servers' alone, and no proxy is between them."""
    drop = {"BATCH_INVARIANT", *SWITCHES_OF_THE_MODE, *NOT_FOR_VLLM}
    env = {name: value for name, value in os.environ.items() if name not in drop}
    return env | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "no_proxy": "127.0.0.1"}


def server(name: str, port: int, model: str, settings: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """A system's command and environment.

    vllm/serve.py switches vLLM's own mode on only together with the kit, so that mode alone is started past it, with
    the arguments that it gives the kit's server: not every release's mode chooses an attention backend itself.
    """
    env = demo.server_env(port, model, "1" if name == KIT else "0", settings)
    cache = env.get("VLLM_CACHE_ROOT") or str(Path.home() / ".cache" / "vllm")
    env["VLLM_CACHE_ROOT"] = f"{cache}-online-{name}"
    if name != OWN:
        return [sys.executable, str(ROOT / "vllm" / "serve.py")], env
    plain = Settings.read(env)
    return command(replace(plain, batch_invariant=True), Installed.find()), environment(plain, env) | MODE


def versions(on_cpu: bool) -> dict[str, str]:
    """The device's name and the releases; CUDA is asked in another process, so that this one holds no GPU memory."""
    if on_cpu:
        gpu = f"none: {processor()}, {len(os.sched_getaffinity(0))} cores"
    else:
        ask = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
        gpu = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    found = {"gpu": gpu, "vllm": Installed.find().release}
    for package in ("torch", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found


def capacity(bench: Bench, servers: Mapping[Program, int], prompts: int | None) -> float:
    """Requests/s that plain vLLM answers of a burst, after each server's warm-up, whose rate sizes the burst."""
    warm = {}
    for one, port in servers.items():
        found = bench.run(one, port, bench.load.warm_up, math.inf, WARM_UP_SEED)
        warm[one.name] = found["request_throughput"]
        demo.say(f"{one.name}: warmed up, {warm[one.name]:.2f} requests/s")
    plain, port = next((one, port) for one, port in servers.items() if one.name == PLAIN)
    burst = prompts or max(bench.load.warm_up, round(warm[PLAIN] * bench.load.seconds))
    found = bench.run(plain, port, burst, math.inf, WARM_UP_SEED + 1)["request_throughput"]
    demo.say(f"{PLAIN}: its capacity is {found:.2f} requests/s, by a burst of {burst}")
    return found


def measure(
    bench: Bench, servers: Mapping[Program, int], rates: Mapping[float, float], rounds: int, prompts: int | None
) -> Iterator[dict]:
    """The figures of each run, as it ends; the rates are by their fraction of the capacity."""
    for fraction, rate in rates.items():
        count = prompts or max(1, round(rate * bench.load.seconds))
        for turn in range(rounds):
            order = list(servers.items())
            for one, port in order[turn % len(order) :] + order[: turn % len(order)]:
                found = bench.run(one, port, count, rate, seed=turn)
                row = {"fraction": fraction, "rate": round(rate, 4), "round": turn, "system": one.name}
                row |= {name: round(found[key], 4) for name, key in FIGURES.items()}
                demo.say(
                    f"{fraction:.0%} round {turn} {one.name}: TTFT {row['ttft_median_ms']:.1f} ms"
                    f" (p99 {row['ttft_p99_ms']:.1f}), ITL {row['itl_median_ms']:.2f} ms (p99 {row['itl_p99_ms']:.2f}),"
                    f" {row['requests_per_s']:.2f} requests/s"
                )
                yield row | {"completed": found["completed"], "failed": found["failed"]}


def summary(rows: list[dict]) -> dict:
    """By fraction, system and figure: the median value, and the median and the ends of its ratios to plain's."""
    by_run = {(row["fraction"], row["system"], row["round"]): row for row in rows}
    found: dict = {}
    for fraction in dict.fromkeys(row["fraction"] for row in rows):
        systems = found[str(fraction)] = {}
        for system in dict.fromkeys(row["system"] for row in rows):
            pairs = [
                (row, by_run[fraction, PLAIN, r])
                for (f, s, r), row in by_run.items()
                if (f, s) == (fraction, system) and (fraction, PLAIN, r) in by_run
            ]
            if not pairs:
                continue
            figures = systems[system] = {"rounds": len(pairs)}
            for name in FIGURES:
                ratios = [row[name] / plain[name] for row, plain in pairs]
                figures[name] = {
                    "median": round(statistics.median(row[name] for row, _ in pairs), 4),
                    "ratio": round(statistics.median(ratios), 4),
                    "spread": [round(min(ratios), 4), round(max(ratios), 4)],
                }
    return found


def online(arguments: argparse.Namespace) -> int:
    chosen = demo.scale()
    on_cpu = chosen is demo.CPU
    systems = [name for name in ENVIRONMENTS if name in arguments.systems]
    if on_cpu and OWN in systems:
        demo.say(f"{OWN}: left out, as vLLM's CPU build has no such mode")
        systems.remove(OWN)
    given = {name: getattr(arguments, name) for name in ("input_len", "output_len", "seconds")}
    load = replace(CPU if on_cpu else GPU, **{name: value for name, value in given.items() if value is not None})
    demo.FOLDER.mkdir(exist_ok=True)
    model = arguments.model or str(demo.make_model(chosen.preset))
    on_gpu = f"--kv-cache-memory-bytes {int(arguments.kv_cache_gib * 2**30)}"
    extra = chosen.settings["VLLM_EXTRA_ARGS"] if on_cpu else on_gpu
    settings = {
        **chosen.settings,
        "VLLM_ATTENTION_BACKEND": arguments.attention_backend or ("auto" if on_cpu else ATTENTION),
        "VLLM_EXTRA_ARGS": f"{extra} --no-enable-prefix-caching",
    }
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    client = Client(out / "online-bench.log")
    with tempfile.TemporaryDirectory() as folder, Programs() as programs, client:
        servers = {}
        for name in systems:
            port = free_port()
            argv, env = server(name, port, model, settings)
            servers[programs.start(name, argv, env, out / f"online-{name}.log")] = port
        about = versions(on_cpu) | {"input_len": load.input_len, "output_len": load.output_len}
        wait_until_ready(servers, demo.START_SECONDS, demo.say)
        bench = Bench(client, model, load, Path(folder))
        most = capacity(bench, servers, arguments.prompts)
        rates = {fraction: fraction * most for fraction in arguments.fractions}
        found = measure(bench, servers, rates, arguments.rounds, arguments.prompts)
        rows: list[dict] = []
        try:
            for row in kept((about | row for row in found), out / "online.csv"):
                rows.append(row)
        finally:
            if rows:
                report = {**about, "ratio_to": PLAIN, "capacity": round(most, 4), "fractions": summary(rows)}
                (out / "online.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for fraction, figures in report["fractions"].items():
        for name, entry in figures.items():
            if name == PLAIN:
                continue
            ratios = "  ".join(f"{figure} {entry[figure]['ratio']:.3f}" for figure in FIGURES)
            demo.say(f"{float(fraction):.0%} {name:14} over {PLAIN}: {ratios}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="its folder (default: the demo's, made where it is missing)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="the folder to write to")
    parser.add_argument("--systems", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS))
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--prompts", type=int, help="of a run (default: as many as arrive in --seconds)")
    parser.add_argument("--seconds", type=float, help=f"a run, about ({GPU.seconds:.0f}, on a CPU {CPU.seconds:.0f})")
    parser.add_argument("--input-len", type=int, help=f"tokens ({GPU.input_len}, on a CPU {CPU.input_len})")
    parser.add_argument("--output-len", type=int, help=f"tokens ({GPU.output_len}, on a CPU {CPU.output_len})")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.5, 0.9], help="of plain vLLM's capacity")
    parser.add_argument("--attention-backend", choices=GPU_BACKENDS, help=f"of all systems, on a GPU ({ATTENTION})")
    parser.add_argument(
        "--kv-cache-gib", type=float, default=8.0, help="of each system, on a GPU (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.client:
        serve_clients(channel_back())
        return 0
    if PLAIN not in arguments.systems:
        parser.error(f"--systems={' '.join(arguments.systems)!r} is not valid: {PLAIN} is what the others are held to")
    if any(fraction <= 0 for fraction in arguments.fractions):
        parser.error(f"--fractions={arguments.fractions} is not valid: numbers above 0 are needed")
    for name, least in (("rounds", 1), ("prompts", 1), ("input_len", 2), ("output_len", 2)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')}={value} is not valid: at least {least} is needed")
    return run_command("online", lambda: online(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
