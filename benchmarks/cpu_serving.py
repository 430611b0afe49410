#!/usr/bin/env python3
"""What batch invariance costs on a CPU: the demo's two servers under the demo's load, in interleaved rounds.

    .venv/bin/python benchmarks/cpu_serving.py [--rounds 7]

Both servers stay up; a round runs the harness against each, the first of them changing from round to round. Writes a
line a round to benchmarks/results/cpu_serving.csv: seconds alone and under load, and our time over the plain server's.
The machine must have nothing else to do.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "vllm"))

import demo  # noqa: E402
from local_server import Failure, Programs, free_port, wait_until_ready  # noqa: E402
from rounds import kept, processor  # noqa: E402


def rounds(count: int, folder: Path):
    """The rows of the CSV, one a round."""
    scale = demo.scale()
    demo.FOLDER.mkdir(exist_ok=True)
    model = str(demo.make_model(scale.preset))
    with Programs() as programs:
        servers = {}
        for name, mode in ((demo.PLAIN, "0"), (demo.OURS, "1")):
            port = free_port()
            env = demo.server_env(port, model, mode, scale.settings)
            command = [sys.executable, str(ROOT / "vllm" / "serve.py")]
            servers[programs.start(name, command, env, folder / f"{demo.FILES[name]}.log")] = port
        wait_until_ready(servers, demo.START_SECONDS, demo.say)
        demo.warm_up(programs, servers, scale.options(scale.warm_up))
        for number in range(count):
            order = list(servers.items())
            found = {}
            for server, port in order if number % 2 == 0 else reversed(order):
                options = scale.options(scale.load[0])
                found[server.name] = demo.measure(programs, server, port, options, folder / "result.json")
            plain, ours = found[demo.PLAIN], found[demo.OURS]
            yield {
                "processor": processor(), "cores": len(os.sched_getaffinity(0)), "vllm": ours["server"]["version"],
                "round": number,
                "plain_identical": plain["identical_to_solo"], "kit_identical": ours["identical_to_solo"],
                "requests": ours["requests"],
                "plain_solo_s": round(plain["solo_seconds"], 3), "kit_solo_s": round(ours["solo_seconds"], 3),
                "plain_loaded_s": round(plain["loaded_seconds"], 3), "kit_loaded_s": round(ours["loaded_seconds"], 3),
                "solo_ratio": round(ours["solo_seconds"] / plain["solo_seconds"], 4),
                "loaded_ratio": round(ours["loaded_seconds"] / plain["loaded_seconds"], 4),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu_serving.csv")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = list(kept(rounds(arguments.rounds, Path(folder)), arguments.out))
    except Failure as failure:
        print(f"cpu_serving: {failure}", file=sys.stderr)
        raise SystemExit(2) from None
    for key in ("solo_ratio", "loaded_ratio"):
        values = sorted(row[key] for row in rows)
        print(
            f"{key}: median {statistics.median(values):.3f}, {values[0]:.3f} to {values[-1]:.3f}, {len(values)} rounds"
        )


if __name__ == "__main__":
    main()
