#!/usr/bin/env python3
"""How long a start takes, and whether the bits are those of the start before: plain vLLM and this kit, side by side.

Each starts three times: with nothing compiled yet, from what that start left, and so once more without what was
compiled ahead of time. After each it answers prompts alone and again in a crowd. Of the kit all tokens and logprobs
must be alike, in the crowd, and over all starts; of plain vLLM, which is the control, they must not be.

    python3 benchmarks/starts.py --model .demo/llama-8b-8layers

writes a line a start to benchmarks/results/starts-RELEASE.csv. The exit status is 1 where the kit's bits are not alike,
3 where plain vLLM's are.
"""

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rounds import kept
from serving import ATTENTION, KIT, PLAIN, ROOT, Worker, engine_of

COLD, WARM, TRACED = "nothing compiled", "warm caches", "warm caches, traced anew"
CACHES = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "BATCH_INVARIANT_CACHE")


def starts(arguments: argparse.Namespace, engine: dict[str, Any], logs: Path) -> Iterator[dict[str, Any]]:
    """Rows of the CSV, as they come; the systems start at once."""
    for what in (COLD, WARM, TRACED):
        os.environ.pop("VLLM_USE_AOT_COMPILE", None)
        if what == TRACED:
            os.environ["VLLM_USE_AOT_COMPILE"] = "0"
        workers = [Worker(name, logs / f"starts-{name}.log") for name in (PLAIN, KIT)]
        try:
            for one in workers:
                one.send(do="start", arguments=engine)
            started = {one: one.receive() for one in workers}
            for one, (versions, start) in started.items():
                found = one.ask(
                    do="bits", prompts=arguments.prompts, others=arguments.others, longest=arguments.longest
                )
                yield versions | {"start": what, "system": one.name} | start | found
        finally:
            for one in workers:
                one.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="its folder; vllm/tiny_model.py --preset llama-8b-8layers makes one"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="the folder to write to")
    parser.add_argument("--attention-backend", default=ATTENTION, help="or auto (default: %(default)s)")
    parser.add_argument("--kv-cache-gib", type=float, default=6.0, help="of each system (default: %(default)s)")
    parser.add_argument("--max-model-len", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=24, help="that are asked alone, too (default: %(default)s)")
    parser.add_argument("--others", type=int, default=100, help="beside them in the crowd (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=900, help="tokens of a prompt (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    engine = engine_of(arguments, arguments.max_model_len)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {name: str(Path(folder) / name.lower()) for name in CACHES}
        rows = starts(arguments, engine, arguments.out)
        first = next(rows)
        name = f"starts-{first['vllm'].split('+')[0]}.csv"
        done: dict[str, list[dict[str, Any]]] = {PLAIN: [], KIT: []}
        for row in kept(itertools.chain([first], rows), arguments.out / name):
            print(
                f"{row['start']:<26} {row['system']:<6} {row['seconds']:6.1f} s  {row['identical']:3} of {row['of']} "
                f"in the crowd as alone, {row['alone']}", flush=True,
            )  # fmt: skip
            done[row["system"]].append(row)
    alike = {name: all(row["identical"] == row["of"] for row in rows) for name, rows in done.items()}
    if not alike[KIT] or len({row["alone"] for row in done[KIT]}) > 1:
        print("FAIL: the kit's bits are not alike")
        return 1
    if alike[PLAIN]:
        print("INCONCLUSIVE: plain vLLM's bits were alike, too: more --others are needed")
        return 3
    print("PASS: the kit's bits were alike in the crowd and over all starts, plain vLLM's were not")
    return 0


if __name__ == "__main__":
    sys.exit(main())
