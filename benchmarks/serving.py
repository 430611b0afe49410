#!/usr/bin/env python3
"""Offline serving time of plain vLLM, vLLM's own batch-invariant mode and this kit, interleaved in one run.

Each system is one `vllm.LLM` in a process of its own, with torch.compile and CUDA graphs on and its own compile cache;
all stay up and are asked in turn, round by round, so that a change of the machine meets all of them. A time is one
`generate` call over prompts of random token ids, new ones in every round, the same for each system. GPU time is that in
which a kernel ran, of one more call under torch's profiler, which also says which kernels they were.

    python3 benchmarks/serving.py --model .demo/llama-8b-8layers

writes to benchmarks/results/ a line a call (serving-RELEASE.csv), each call's kernels (serving-RELEASE-kernels.csv) and
the ratios to plain vLLM, by release (serving.json, in which other releases, workloads and systems stay).
"""

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
PLAIN, OWN, KIT = "plain", "vllm-own-mode", "kit"
MODE = {"VLLM_BATCH_INVARIANT": "1"}
ATTENTION = "FLASH_ATTN"
"""The backend of all systems but those that name their own, unless another is asked for."""
ENVIRONMENTS = {
    PLAIN: {},
    OWN: MODE,
    KIT: MODE | {"BATCH_INVARIANT": "1", "CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"},
}
FLEX = {"attention_backend": "FLEX_ATTENTION"}
KIT_BY: dict[str, dict[str, Any]] = {
    f"{KIT}-triton": {"attention_backend": "TRITON_ATTN"},
    f"{KIT}-flex": FLEX,
    # the cache's pages, too, are of as many tokens: vLLM lets FlexAttention's blocks be no larger
    f"{KIT}-flex-64": FLEX
    | {
        "block_size": 64,
        "attention_config": {"flex_attn_block_m": 64, "flex_attn_block_n": 64, "flex_attn_q_block_size": 64},
    },
}
"""Asked for by name: this kit with an attention backend of its own, and the engine's arguments for it."""


@dataclass(frozen=True)
class Workload:
    """That many prompts at once, each of `tokens_in` tokens and answered with `tokens_out`.

    With `decode_only`, what the first of those takes is measured by itself and subtracted.
    """

    prompts: int
    tokens_in: int
    tokens_out: int
    decode_only: bool = False


WORKLOADS = {
    "bs1": Workload(1, 128, 128),
    "bs16": Workload(16, 128, 128),
    "bs128": Workload(128, 128, 128),
    "prefill": Workload(32, 2048, 1),
    "long": Workload(8, 6000, 64),
}
CONTEXTS = {
    "1x2k": Workload(1, 2048, 129, decode_only=True),
    "1x8k": Workload(1, 8192, 129, decode_only=True),
    "1x32k": Workload(1, 32768, 129, decode_only=True),
    "1x64k": Workload(1, 65536, 129, decode_only=True),
    "4x32k": Workload(4, 32768, 129, decode_only=True),
}
"""Asked for by name: how long 128 further tokens take after a long prompt."""
STEPS = {f"step-{tokens}": Workload(1, tokens, 1) for tokens in (513, 700, 1040, 2000)}
"""Asked for by name: a step too long for vLLM's CUDA graphs, which waits for the host as much as for the GPU."""
ALL = WORKLOADS | CONTEXTS | STEPS


def answers(llm: Any, prompts: Sequence[list[int]], sampling: list[Any]) -> list[tuple[list, list]]:
    """Of each prompt, asked all at once: the token ids, and at each the best tokens with their logprobs."""
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    outputs = [request.outputs[0] for request in done]
    return [
        (list(output.token_ids), [sorted((i, one.logprob) for i, one in at.items()) for at in output.logprobs])
        for output in outputs
    ]


class System:
    """One engine, in the worker process; asked with one JSON object a line."""

    def __init__(self, arguments: dict) -> None:
        begin = time.perf_counter()
        from vllm import LLM

        self.llm = LLM(**arguments, enable_prefix_caching=False, disable_log_stats=True)
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self.seconds = time.perf_counter() - begin

    def generate(self, workload: Workload, seed: int) -> float:
        """Seconds of one call, or of its decoding alone."""
        if workload.decode_only:
            whole = replace(workload, decode_only=False)
            return self.generate(whole, seed) - self.generate(replace(whole, tokens_out=1), seed)
        from vllm import SamplingParams

        generator = random.Random(seed)
        prompts = [
            {"prompt_token_ids": generator.choices(range(2, self.vocabulary), k=workload.tokens_in)}
            for _ in range(workload.prompts)
        ]
        sampling = SamplingParams(
            temperature=0, max_tokens=workload.tokens_out, min_tokens=workload.tokens_out, ignore_eos=True,
            detokenize=False,
        )  # fmt: skip
        begin = time.perf_counter()
        answers = self.llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        assert all(len(answer.outputs[0].token_ids) == workload.tokens_out for answer in answers)
        return seconds

    def bits(self, prompts: int, others: int, longest: int) -> dict[str, Any]:
        """Prompts asked alone and again in a crowd, every third drawn at a temperature: tokens and logprobs compared.

        Args:
            prompts: that are asked alone, and three times each in the crowd.
            others: that are beside them there.
            longest: tokens of a prompt, at most.

        Returns:
            How many of the crowd's answers have the bits of those alone, of how many, and a digest of those alone.
        """
        from vllm import SamplingParams

        generator = random.Random(5)

        def prompt() -> list[int]:
            return generator.choices(range(2, self.vocabulary), k=generator.randint(1, longest))

        def ask(asked: list[tuple[int, list[int]]]) -> list[tuple[list, list]]:
            sampling = [
                SamplingParams(
                    temperature=0.8 if number % 3 == 2 else 0, seed=number, max_tokens=40, ignore_eos=True,
                    detokenize=False, logprobs=2,
                )
                for number, _ in asked
            ]  # fmt: skip
            return answers(self.llm, [each for _, each in asked], sampling)

        chosen = [(number, prompt()) for number in range(prompts)]
        alone = [ask([one])[0] for one in chosen]
        crowd = chosen * 3 + [(prompts + number, prompt()) for number in range(others)]
        generator.shuffle(crowd)
        same = [
            answer == alone[number] for (number, _), answer in zip(crowd, ask(crowd), strict=True) if number < prompts
        ]
        digest = hashlib.sha256(json.dumps(alone).encode()).hexdigest()[:16]
        return {"identical": sum(same), "of": len(same), "alone": digest}

    def profile(self, workload: Workload) -> dict[str, Any]:
        """The GPU's milliseconds in one call, and kernel name -> [calls, milliseconds]; none of decoding alone."""
        import torch
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        if workload.decode_only or not torch.cuda.is_available():
            return {"gpu_ms": 0.0, "kernels": {}}
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.generate(workload, seed=-1)
        events = profiler.events()
        ran = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
        kernels: dict[str, list[float]] = {}
        for event in ran:
            found = kernels.setdefault(event.name, [0, 0.0])
            found[0] += 1
            found[1] += event.time_range.elapsed_us() / 1e3
        spans = [(event.time_range.start, event.time_range.end) for event in ran]
        return {"gpu_ms": covered(spans) / 1e3, "kernels": kernels}

    def start(self) -> dict[str, float]:
        """Seconds from the first import on, and what torch then holds of the GPU's memory."""
        import torch

        reserved = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
        return {"seconds": round(self.seconds, 1), "gpu_mib": reserved >> 20}

    def versions(self) -> dict[str, Any]:
        import torch
        import triton

        import vllm

        return {
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "layers": self.llm.llm_engine.model_config.hf_text_config.num_hidden_layers,
        }


def channel_back() -> TextIO:
    """This process's stdout, for answers alone; what vLLM prints to it goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def worker(answers: TextIO) -> None:
    system = None
    for line in sys.stdin:
        ask = json.loads(line)
        workload = Workload(**ask.pop("workload", {"prompts": 0, "tokens_in": 0, "tokens_out": 0}))
        do = ask.pop("do")
        if do == "start":
            system = System(ask["arguments"])
            answer = [system.versions(), system.start()]
        elif do == "generate":
            answer = system.generate(workload, ask["seed"])
        elif do == "bits":
            answer = system.bits(**ask)
        else:
            answer = system.profile(workload)
        print(json.dumps(answer), file=answers, flush=True)


def covered(spans: list[tuple[float, float]]) -> float:
    """What spans (start, end) cover together: kernels that are launched while others end run beside them for a while.

    >>> covered([(0, 4), (3, 5), (7, 8), (3, 4)])
    6
    """
    total: float = 0
    reached = -math.inf
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def environment(name: str) -> dict[str, str]:
    """A system's, with a compile cache of its own."""
    system = KIT if name in KIT_BY else name
    drop = {key for one in ENVIRONMENTS.values() for key in one}
    env = {key: value for key, value in os.environ.items() if key not in drop} | ENVIRONMENTS[system]
    path = [str(ROOT / "vllm"), str(ROOT)] if system == KIT else []
    env["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, [env.get("PYTHONPATH")])])
    cache = env.get("VLLM_CACHE_ROOT") or str(Path.home() / ".cache" / "vllm")
    # an engine in one process: a profiler sees the kernels of its own alone
    return env | {"VLLM_CACHE_ROOT": f"{cache}-{name}", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class Worker:
    """A system's process."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker"], env=environment(name),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True,
            )  # fmt: skip

    def send(self, **question) -> None:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()

    def receive(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"serving: the engine of {self.name} stopped; its log says why")
        return json.loads(line)

    def ask(self, **question):
        self.send(**question)
        return self.receive()

    def stop(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def summary(rows: list[dict], gpu_ms: dict) -> dict:
    """By workload and system: the median ratio of its time to plain's in the same round, and the ratio of GPU time."""
    times = {(row["workload"], row["system"], row["round"]): row["seconds"] for row in rows}
    found: dict = defaultdict(dict)
    for workload in dict.fromkeys(row["workload"] for row in rows):
        for system in dict.fromkeys(row["system"] for row in rows):
            rounds = [r for w, s, r in times if (w, s) == (workload, system)]
            ratios = [times[workload, system, r] / times[workload, PLAIN, r] for r in rounds]
            entry = {
                "ratio": round(statistics.median(ratios), 3),
                "spread": [round(min(ratios), 3), round(max(ratios), 3)],
                "seconds": round(statistics.median(times[workload, system, r] for r in rounds), 4),
            }
            if gpu_ms.get((workload, PLAIN)):
                entry["gpu_ms"] = round(gpu_ms[workload, system], 2)
                entry["gpu_ratio"] = round(gpu_ms[workload, system] / gpu_ms[workload, PLAIN], 3)
            found[workload][system] = entry
    return dict(found)


def measure(workers: list[Worker], workloads: list[str], rounds: int, gpu_ms: dict):
    """Rows of the CSV, and of the kernels' CSV, as they come: ("call", ...) and ("kernel", ...).

    Fills ``gpu_ms``, the GPU's milliseconds by (workload, system).
    """
    for name in workloads:
        workload = vars(ALL[name])
        seconds: dict[str, list[float]] = {one.name: [] for one in workers}
        for one in workers:
            one.ask(do="generate", workload=workload, seed=-2)
        for turn in range(rounds):
            for one in workers[turn % len(workers) :] + workers[: turn % len(workers)]:
                taken = round(one.ask(do="generate", workload=workload, seed=turn), 5)
                seconds[one.name].append(taken)
                yield "call", {"workload": name, "system": one.name, "round": turn, "seconds": taken}
        for one in workers:
            found = one.ask(do="profile", workload=workload)
            gpu_ms[name, one.name] = found["gpu_ms"]
            for kernel, (calls, ms) in sorted(found["kernels"].items(), key=lambda item: -item[1][1])[:25]:
                row = {"workload": name, "system": one.name, "kernel": kernel[:160], "calls": calls, "ms": round(ms, 3)}
                yield "kernel", row
        print(f"{name}: " + ", ".join(f"{s} {statistics.median(t):.3f} s" for s, t in seconds.items()), flush=True)


def record(folder: Path, name: str, versions: dict[str, Any], found) -> list[dict]:
    """Write each row to its CSV when it comes, so that a run that is cut short keeps what it has; returns the calls."""
    names = {"call": f"{name}.csv", "kernel": f"{name}-kernels.csv"}
    calls: list[dict] = []
    with contextlib.ExitStack() as stack:
        files = {
            kind: stack.enter_context((folder / name).open("w", newline="", encoding="utf-8"))
            for kind, name in names.items()
        }
        tables: dict[str, csv.DictWriter] = {}
        for kind, row in found:
            row = versions | row
            if kind not in tables:
                tables[kind] = csv.DictWriter(files[kind], list(row))
                tables[kind].writeheader()
            tables[kind].writerow(row)
            files[kind].flush()
            if kind == "call":
                calls.append(row)
    return calls


def add_to(path: Path, versions: dict[str, Any], starts: dict, workloads: dict) -> None:
    """Put a run's figures into the summary, in the place of those of the same release, workloads and systems.

    Figures of a release with another number of layers give way.
    """
    releases = json.loads(path.read_text(encoding="utf-8"))["releases"] if path.is_file() else {}
    before = releases.get(versions["vllm"], {})
    if before.get("layers") != versions["layers"]:
        before = {}
    found = before.get("workloads", {})
    releases[versions["vllm"]] = versions | {
        "start": before.get("start", {}) | starts,
        "workloads": found | {name: found.get(name, {}) | systems for name, systems in workloads.items()},
    }
    text = json.dumps({"ratio_to": PLAIN, "releases": releases}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def engine_of(arguments: argparse.Namespace, max_model_len: int) -> dict[str, Any]:
    """vLLM's arguments of every system, of which several share a card."""
    engine = {
        "model": arguments.model,
        "max_model_len": max_model_len,
        "gpu_memory_utilization": 0.28,
        "kv_cache_memory_bytes": int(arguments.kv_cache_gib * 2**30),
    }
    if arguments.attention_backend != "auto":
        engine["attention_backend"] = arguments.attention_backend
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="its folder; vllm/tiny_model.py --preset llama-8b-8layers makes one")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="the folder to write to")
    parser.add_argument("--name", default="serving", help="what the CSV's name begins with (default: %(default)s)")
    parser.add_argument("--workloads", nargs="+", choices=ALL, default=list(WORKLOADS))
    parser.add_argument("--systems", nargs="+", choices=[*ENVIRONMENTS, *KIT_BY], default=list(ENVIRONMENTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-model-len", type=int, help="(default: what the workloads need)")
    parser.add_argument(
        "--attention-backend", default=ATTENTION, help="of systems that name none (default: %(default)s)"
    )
    parser.add_argument("--kv-cache-gib", type=float, default=6.0, help="of each system (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(channel_back())
    if not arguments.model:
        parser.error("--model='' is not valid: a model's folder is needed")
    if PLAIN not in arguments.systems:
        parser.error(f"--systems={' '.join(arguments.systems)!r} is not valid: {PLAIN} is what the others are held to")
    arguments.out.mkdir(parents=True, exist_ok=True)
    asked = [ALL[name] for name in arguments.workloads]
    longest = max(8192, *(workload.tokens_in + workload.tokens_out for workload in asked))
    engine = engine_of(arguments, arguments.max_model_len or longest)
    workers = [Worker(name, arguments.out / f"serving-{name}.log") for name in arguments.systems]
    try:
        for one in workers:
            one.send(do="start", arguments=engine | KIT_BY.get(one.name, {}))
        answers = {one.name: one.receive() for one in workers}
        versions = answers[PLAIN][0]
        starts = {name: start for name, (_, start) in answers.items()}
        print("start:", ", ".join(f"{name} {start}" for name, start in starts.items()), flush=True)
        gpu_ms: dict = {}
        name = f"{arguments.name}-{versions['vllm']}"
        rows = record(arguments.out, name, versions, measure(workers, arguments.workloads, arguments.rounds, gpu_ms))
    finally:
        for one in workers:
            one.stop()
    found = summary(rows, gpu_ms)
    add_to(arguments.out / "serving.json", versions, starts, found)
    for name, systems in found.items():
        print(
            f"{name:8}",
            *(f"{s} {e['ratio']:.3f} (GPU {e.get('gpu_ratio', '-')})" for s, e in systems.items()),
            sep="  ",
        )


if __name__ == "__main__":
    main()
