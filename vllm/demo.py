#!/usr/bin/env python3
"""Prove on this machine that the server's answers do not depend on its load, and that plain vLLM's do.

Makes a random model (a small one for vLLM's CPU build, 8 layers of Llama-3.1-8B's shapes for a GPU), starts the real
vLLM server twice, plain (the control) and batch-invariant, runs the determinism harness against each under mixed load,
prints one table and a verdict, and writes report.html.

Exit status: 0 PASS (the control failed and our server passed), 1 FAIL, 3 INCONCLUSIVE (the control passed, so that
the test had no power here), 2 for a setting that cannot work or a server that did not start.

VLLM_PORT (default 8000) is our server's port. With BATCH_INVARIANT=0 our server is plain, too, and the verdict is FAIL.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from local_server import (  # noqa: E402
    Failure,
    Program,
    Programs,
    check_free,
    check_machine,
    free_port,
    run_command,
    wait_until_ready,
)
from serve import Installed  # noqa: E402

FOLDER = HERE.parent / ".demo"
REPORT = HERE.parent / "report.html"
PLAIN, OURS = "plain vLLM", "batch-invariant"
FILES = {PLAIN: "plain", OURS: "batch-invariant"}
START_SECONDS = 600.0
HOW = (
    "Each prompt was sent alone to an idle server; then many copies of all prompts, mixed, with other traffic beside."
    " Both servers ran the same model with the same settings but one: batch invariance. The one not being measured"
    " idled, and both were warmed up before."
)
OTHER_SETTINGS = {
    *("MODEL_NAME", "SERVED_MODEL_NAME", "MAX_MODEL_LEN", "DTYPE", "HF_TOKEN", "VLLM_ATTENTION_BACKEND"),
    *("VLLM_HOST", "VLLM_BIND", "VLLM_API_KEY", "VLLM_EXTRA_ARGS", "TENSOR_PARALLEL_SIZE", "GPU_MEMORY_UTILIZATION"),
}


@dataclass(frozen=True)
class Scale:
    """What is served, and how hard it is asked.

    Attributes:
        preset: the model, by its name in tiny_model.py.
        settings: of both servers.
        load: requests, how many at a time, and tokens of each answer.
        warm_up: requests before the first that is timed.
    """

    preset: str
    settings: Mapping[str, str]
    load: tuple[int, int, int]
    warm_up: int

    def options(self, requests: int) -> tuple[str, ...]:
        _, concurrency, tokens = self.load
        return ("--requests", str(requests), "--concurrency", str(concurrency), "--max-tokens", str(tokens))


# A small server starts faster, and still mixes prefill and decode of many requests.
CPU = Scale(
    preset="tiny",
    settings={
        "VLLM_EXTRA_ARGS": "--max-num-batched-tokens 512 --max-num-seqs 32",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    },
    load=(96, 16, 32),
    warm_up=32,
)
# Two servers share one GPU, and start together: a KV cache of a fixed size is one that neither measures the other for.
GPU = Scale(
    preset="llama-8b-8layers",
    settings={
        "MAX_MODEL_LEN": "8192",
        "GPU_MEMORY_UTILIZATION": "0.3",
        "VLLM_EXTRA_ARGS": f"--kv-cache-memory-bytes {8 * 2**30}",
    },
    load=(400, 128, 64),
    warm_up=128,
)


@dataclass(frozen=True)
class Verdict:
    """What two harness runs together say."""

    name: str
    status: int
    reason: str


def judge(control: Mapping, ours: Mapping) -> Verdict:
    """PASS needs both: ours deterministic down to the logprobs, and a control that this very test caught.

    A server whose requests failed is a failure to the harness, too, but no answer of it was seen to change: as a
    control it shows nothing.
    """
    if ours["verdict"] == "fail":
        changed = "the batch-invariant server's answers changed with the load"
        return Verdict("FAIL", 1, changed if ours["divergences"] else f"{OURS}: {ours['reason']}")
    if control["verdict"] == "pass":
        return Verdict("INCONCLUSIVE", 3, "plain vLLM passed as well, so this test had no power here")
    for name, result in ((PLAIN, control), (OURS, ours)):
        if result["verdict"] not in ("pass", "fail"):
            return Verdict("INCONCLUSIVE", 3, f"{name}: {result.get('reason') or 'the harness could not tell'}")
        if result["level"] != "logprobs":
            return Verdict("INCONCLUSIVE", 3, f"{name}: only the {result['level']} could be compared, not the logprobs")
    if not control["divergences"]:
        return Verdict("INCONCLUSIVE", 3, f"{PLAIN}: {control['reason']}")
    return Verdict("PASS", 0, "plain vLLM's answers changed with the load, the batch-invariant server's did not")


def say(text: str) -> None:
    print(text, flush=True)


def scale() -> Scale:
    """What suits the vLLM that is installed: its CPU build, or one for GPUs.

    Raises:
        Failure: none is installed, or the CPU build lacks something of the system's.
    """
    try:
        on_cpu = Installed.find().is_cpu
    except SystemExit as error:
        raise Failure(str(error)) from None
    if on_cpu:
        check_machine()
    return CPU if on_cpu else GPU


def server_env(port: int, model: str, batch_invariant: str, settings: Mapping[str, str]) -> dict[str, str]:
    """What vllm/serve.py reads, for the demo's server; settings meant for another server are dropped."""
    env = {name: value for name, value in os.environ.items() if name not in OTHER_SETTINGS}
    return {
        **env,
        **settings,
        "MODEL_NAME": model,
        "SERVED_MODEL_NAME": "demo",
        "VLLM_PORT": str(port),
        "BATCH_INVARIANT": batch_invariant,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def make_model(preset: str) -> Path:
    """The demo's model; one that is there is kept."""
    folder = FOLDER / ("model" if preset == "tiny" else preset)
    if not (folder / "config.json").is_file():
        say(f"Making a random Llama ({preset}) in .demo/{folder.name}")
        command = [sys.executable, str(HERE / "tiny_model.py"), str(folder), "--preset", preset]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def harness(port: int, *options: str) -> list[str]:
    return [sys.executable, str(HERE / "test_determinism.py"), "--url", f"http://127.0.0.1:{port}", *options]


def warm_up(programs: Programs, servers: Mapping[Program, int], options: tuple[str, ...]) -> None:
    """Put every server through a short load with other prompts: a first load is slower, whichever server it meets.

    What it finds is not looked at: a server that cannot be tested is told of when it is measured.
    """
    say("Warming both up, so that neither is timed cold")
    for port in servers.values():
        programs.start(
            "warm-up", harness(port, *options, "--seed", "1"), os.environ, FOLDER / "warm-up.log"
        ).process.wait()


def measure(programs: Programs, server: Program, port: int, options: tuple[str, ...], result: Path) -> dict:
    """Run the harness against one server, its output in view; returns its JSON report.

    Raises:
        Failure: the harness could not finish, or the server ended; with the end of the server's log.
    """
    say(f"\nTesting {server.name}")
    result.unlink(missing_ok=True)
    # What a pass is worth is shown by the control, not by an estimate.
    command = harness(port, *options, "--min-power", "0", "--json", str(result))
    status = programs.start("harness", command, os.environ).process.wait()
    end_of_log = f"the end of {server.log}:\n{server.last_lines()}"
    if server.process.poll() is not None:
        raise Failure(f"{server.name}: the server ended while it was tested; {end_of_log}")
    if status not in (0, 1, 3) or not result.is_file():
        raise Failure(f"{server.name}: the harness ended with status {status}, its output is above; {end_of_log}")
    return json.loads(result.read_text(encoding="utf-8"))


def print_table(results: Mapping[str, Mapping]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("", no_wrap=True)
    for heading in ("token variants", "logprob variants", "identical to solo", "solo, s", "loaded, s", "ratio"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            *("-" if result[key] is None else str(result[key]) for key in ("token_variants", "logprob_variants")),
            f"{result['identical_to_solo']} of {result['requests']}",
            *(f"{result[key]:.1f}" for key in ("solo_seconds", "loaded_seconds")),
            f"{result['loaded_seconds'] / results[PLAIN]['loaded_seconds']:.2f}",
        )
    say("")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def ports() -> tuple[int, int]:
    """(our server's, the control's)."""
    text = os.environ.get("VLLM_PORT", "").strip() or "8000"
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise Failure(f"VLLM_PORT={text!r} is not valid: a port number from 1 to 65535 is needed")
    check_free(int(text))
    return int(text), free_port()


def switch() -> str:
    value = os.environ.get("BATCH_INVARIANT", "").strip() or "1"
    if value not in ("0", "1"):
        raise Failure(f"BATCH_INVARIANT={value!r} is not valid: one of 0, 1 is needed")
    return value


def demo() -> int:
    """The whole demo; returns the exit status."""
    begin = time.monotonic()
    our_port, control_port = ports()
    ours_is = switch()
    chosen = scale()
    FOLDER.mkdir(exist_ok=True)
    model = str(make_model(chosen.preset))
    with Programs() as programs:
        say("Starting two servers, plain vLLM and batch-invariant; their logs are in .demo/")
        servers: dict[Program, int] = {}
        for name, port, mode in ((PLAIN, control_port, "0"), (OURS, our_port, ours_is)):
            env = server_env(port, model, mode, chosen.settings)
            log = FOLDER / f"{FILES[name]}.log"
            servers[programs.start(name, [sys.executable, str(HERE / "serve.py")], env, log)] = port
        wait_until_ready(servers, START_SECONDS, say)
        warm_up(programs, servers, chosen.options(chosen.warm_up))
        # One is measured while the other idles, and both stay up until the end: neither has the machine to itself.
        results = {
            server.name: measure(
                programs, server, port, chosen.options(chosen.load[0]), FOLDER / f"{FILES[server.name]}.json"
            )
            for server, port in servers.items()
        }
    verdict = judge(results[PLAIN], results[OURS])
    print_table(results)
    from determinism.report import render

    page = render(verdict, {name: [result] for name, result in results.items()}, HOW)
    REPORT.write_text(page, encoding="utf-8")
    say(f"{verdict.name}: {verdict.reason}")
    say(f"{REPORT.name} has the picture ({time.monotonic() - begin:.0f} s in all)")
    return verdict.status


def serve() -> int:
    """Run one server in the foreground: the demo's model unless MODEL_NAME names another."""
    env = dict(os.environ)
    if not env.get("MODEL_NAME", "").strip():
        ports()
        switch()
        chosen = scale()
        FOLDER.mkdir(exist_ok=True)
        defaults = {"VLLM_PORT": "8000", "BATCH_INVARIANT": "1", **env}
        model = str(make_model(chosen.preset))
        own = server_env(int(defaults["VLLM_PORT"]), model, defaults["BATCH_INVARIANT"], chosen.settings)
        env = own | {name: env[name] for name in OTHER_SETTINGS if env.get(name) and name != "MODEL_NAME"}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, str(HERE / "serve.py")], env)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="only run one server, in the foreground, for curl")
    arguments = parser.parse_args()
    return run_command("demo", serve if arguments.serve else demo)


if __name__ == "__main__":
    raise SystemExit(main())
