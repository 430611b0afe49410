#!/usr/bin/env python3
"""Batch invariance, architecture by architecture, each proof with its control.

    python3 benchmarks/architectures.py [--only llama gpt2] [--dtypes bfloat16] [--attention TRITON_ATTN FLEX_ATTENTION]
                                        [--jobs 4] [--out FILE]

A case is a small random model of one architecture, made here. Plain vLLM and the kit each serve it from a process of
their own, with torch.compile and CUDA graphs on. Each answers a few prompts greedily, alone, one at a time; then the
same prompts several times in a crowd of others, shuffled, so that prefills are cut in chunks and share their batches
with decodes. An answer differs where a token id or a logprob, as a float, is not the one it had alone.

    PASS          the kit's answers never differ, plain vLLM's do
    INCONCLUSIVE  nobody's differ: the case cannot tell a batch-invariant server from another
    FAIL          answers of the kit differ
    ERROR         an engine gave no answers; the row has its last error

Writes a row a case as it ends, to docs/evidence/architectures.csv; the exit status is 1 if any is FAIL or ERROR. The
engines' logs are in benchmarks/results/. Needs vLLM and transformers, as the server does; uses a GPU if there is one,
with the attention backend that `auto` is for the model, the same for both. To try one that is refused, set
BATCH_INVARIANT_ALLOW_UNPROVEN=1.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "vllm"), str(ROOT)]

import serving  # noqa: E402
from local_server import Failure, Program, Programs, run_command  # noqa: E402
from rounds import kept, processor  # noqa: E402
from serve_settings import GPU_BACKENDS  # noqa: E402
from serving import KIT, PLAIN  # noqa: E402

SYSTEMS = (PLAIN, KIT)
PROMPTS = (5, 7, 16, 17, 33, 64, 90, 128, 150, 201, 256, 400)
"""The lengths in tokens of the prompts that are compared."""
OTHERS, LONGEST_OTHER = 40, 450
TOKENS_OUT = 24
WINDOW = 64
"""Of attention, where it slides: shorter than half of the prompts."""
LOOK_AGAIN = 0.25  # seconds
FAILED = ("FAIL", "ERROR")
ENGINE = {
    "max_model_len": 1024,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 2**29,
    "gpu_memory_utilization": 0.05,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
    "generation_config": "vllm",
}


@dataclass(frozen=True)
class Case:
    """A model's shape and the scale of its weights, such that neither attention nor logits are flat.

    Attributes:
        config: class of transformers.
        arguments: of that class.
        dtypes: to try; of the weights and of the arithmetic.
        embedding: standard deviation of the embeddings.
        gain: mean of the norms' weights; 0 where the norm adds one to them.
        final_gain: of the last norm's weights. Where tied embeddings must be small it makes up for it in the logits.
    """

    config: str
    arguments: dict[str, Any]
    dtypes: tuple[str, ...] = ("bfloat16",)
    embedding: float = 1.0
    gain: float = 1.0
    final_gain: float = 1.0

    def backend(self, dtype: str) -> str:
        """The attention backend that a server of the kit would choose on a GPU."""
        import torch

        from batch_invariant_ops.integrations.attention import automatic_backend

        model = SimpleNamespace(
            dtype=getattr(torch, dtype), max_model_len=ENGINE["max_model_len"], disable_sliding_window=False,
            get_sliding_window=lambda: self.arguments.get("sliding_window"),
        )  # fmt: skip
        return automatic_backend(model, None)[0]


def decoder(hidden: int = 512, heads: int = 8, kv_heads: int = 4, **others: Any) -> dict[str, Any]:
    return {
        "vocab_size": 4096,
        "hidden_size": hidden,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        **others,
    }


# Gemma multiplies its embeddings by the root of the hidden size and ties them: small ones, and a large last norm, keep
# the last token from being the answer to itself.
GEMMA: dict[str, Any] = {"embedding": 0.02, "gain": 0.0, "final_gain": 4.0}
GEMMA_SHAPE = decoder(
    heads=4, kv_heads=2, head_dim=256, query_pre_attn_scalar=256, sliding_window=WINDOW, tie_word_embeddings=True,
    layer_types=["sliding_attention", "full_attention"] * 2,
)  # fmt: skip
GPT2_SHAPE = {
    "vocab_size": 50257, "n_embd": 512, "n_layer": 4, "n_head": 8, "n_positions": 1024,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
CASES = {
    "llama": Case("LlamaConfig", decoder(), ("bfloat16", "float16", "float32")),
    "llama-tied": Case("LlamaConfig", decoder(tie_word_embeddings=True), embedding=0.1),
    "llama-head-96": Case("LlamaConfig", decoder(hidden=768)),
    "llama-head-128": Case("LlamaConfig", decoder(hidden=1024)),
    "llama-head-256": Case("LlamaConfig", decoder(hidden=1024, heads=4, kv_heads=2)),
    "mistral-window": Case("MistralConfig", decoder(head_dim=64, sliding_window=WINDOW)),
    "qwen2": Case("Qwen2Config", decoder()),
    "qwen3": Case("Qwen3Config", decoder(head_dim=64)),
    "gemma2": Case("Gemma2Config", GEMMA_SHAPE, **GEMMA),
    "gemma3": Case("Gemma3TextConfig", GEMMA_SHAPE, **GEMMA),
    "phi3": Case("Phi3Config", decoder(original_max_position_embeddings=1024)),
    "gpt2": Case("GPT2Config", GPT2_SHAPE, embedding=0.1),
}


def mean_and_scale(name: str, case: Case, hidden: int) -> tuple[float, float]:
    """Of the normal distribution of a weight, by its name in the checkpoint."""
    layer, _, kind = name.rpartition(".")
    layer = layer.rpartition(".")[2]
    if kind == "bias":
        return 0.0, 0.1
    if layer in ("norm", "ln_f"):
        return case.final_gain, 0.1
    if layer in ("q_norm", "k_norm"):
        return case.gain + 0.8, 0.1
    if "norm" in layer or layer.startswith("ln_"):
        return case.gain, 0.1
    if layer in ("embed_tokens", "wte", "wpe"):
        return 0.0, case.embedding
    by_layer = {"lm_head": 0.1} | dict.fromkeys(("q_proj", "k_proj", "qkv_proj", "c_attn"), 0.08)
    return 0.0, by_layer.get(layer, 0.04) * (512 / hidden) ** 0.5


def make_model(case: Case, dtype: str, folder: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import save_file
    from tiny_model import draw

    config = getattr(transformers, case.config)(**case.arguments)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    weights = {}
    for name, parameter in model.named_parameters():
        mean, scale = mean_and_scale(name, case, config.hidden_size)
        weight = draw(name, tuple(parameter.shape), scale, 0, "cpu")
        weights[name] = (weight.float() + mean).to(getattr(torch, dtype))
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def attention_backends(model: Any) -> list[str]:
    modules = [module for module in model.modules() if hasattr(module, "get_attn_backend")]
    return sorted({module.get_attn_backend().get_name() for module in modules})


class Engine:
    """One system's vLLM, in the worker process."""

    def __init__(self, model: str, dtype: str, attention: str) -> None:
        import torch

        from vllm import LLM

        on_gpu = {"attention_backend": attention} if torch.version.cuda else {}
        self.llm = LLM(model, dtype=dtype, **ENGINE, **on_gpu)
        config = self.llm.llm_engine.model_config
        self.vocabulary, self.head_size = config.get_vocab_size(), config.get_head_size()

    def backend(self) -> str:
        try:
            return " ".join(self.llm.apply_model(attention_backends)[0])
        except Exception as error:
            print(f"architectures: the attention backend cannot be found: {error}", flush=True)
            return ""

    def answers(self, prompts: Sequence[list[int]], tokens_out: Sequence[int]) -> list[tuple[list, list]]:
        """Of each prompt, asked all at once: the token ids, and at each the best tokens with their logprobs."""
        from vllm import SamplingParams

        asked = [
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=5, detokenize=False)
            for tokens in tokens_out
        ]
        found = serving.answers(self.llm, prompts, asked)
        assert [len(tokens) for tokens, _ in found] == list(tokens_out)
        return found

    def compare(self, rounds: int) -> dict[str, int]:
        """How many answers there were in a crowd, and how many of them differ from those alone."""
        generator = random.Random(0)

        def prompt(length: int) -> list[int]:
            return generator.choices(range(2, self.vocabulary), k=length)

        prompts = [prompt(length) for length in PROMPTS]
        begin = time.monotonic()
        alone = [self.answers([one], [TOKENS_OUT])[0] for one in prompts]
        print(f"architectures: alone {time.monotonic() - begin:.1f} s", flush=True)
        found = {"answers": 0, "tokens": 0, "logprobs": 0}
        for _ in range(rounds):
            others = [prompt(generator.randint(1, LONGEST_OTHER)) for _ in range(OTHERS)]
            tokens_out = [TOKENS_OUT] * len(prompts) + [generator.randint(1, 2 * TOKENS_OUT) for _ in others]
            crowd = [*prompts, *others]
            order = generator.sample(range(len(crowd)), len(crowd))
            answers = self.answers([crowd[i] for i in order], [tokens_out[i] for i in order])
            for i, answer in zip(order, answers, strict=True):
                if i < len(prompts):
                    found["answers"] += 1
                    found["tokens"] += answer[0] != alone[i][0]
                    found["logprobs"] += answer != alone[i]
            print(f"architectures: {time.monotonic() - begin:.1f} s, {found}", flush=True)
        return found


def worker(model: str, dtype: str, attention: str, rounds: int, result: Path) -> None:
    engine = Engine(model, dtype, attention)
    found = {"head_size": engine.head_size, "backend": engine.backend(), **engine.compare(rounds)}
    result.write_text(json.dumps(found), encoding="utf-8")


def environment(system: str) -> dict[str, str]:
    # FlashInfer's sampler would be compiled first and is not used here; the engines share the cores, on which a waiting
    # thread must not spin
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    return defaults | serving.environment(system) | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def last_error(log: Path) -> str:
    """The newest line of a log that tells of one, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [
        line for line in lines if re.search("[Ee]rror|refusing", line) and not re.search(" (INFO|WARNING) ", line)
    ]
    return (errors or lines or ["no word"])[-1][:300]


@dataclass(frozen=True)
class Choice:
    """What is tried: a case in one dtype with one attention backend."""

    name: str
    dtype: str
    attention: str

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}-{self.attention}"


class Trial:
    """A case, served by both systems at once."""

    def __init__(self, choice: Choice, rounds: int, folder: Path, logs: Path, programs: Programs) -> None:
        self.choice, self.begin = choice, time.monotonic()
        name, dtype = choice.name, choice.dtype
        model = folder / str(choice)
        self.engines: dict[str, Program] = {}
        self.results = {system: folder / f"{choice}-{system}.json" for system in SYSTEMS}
        self.errors: list[str] = []
        try:
            make_model(CASES[name], dtype, model)
        except Exception as error:  # whatever a release of transformers may raise for a model that it does not know
            self.errors.append(f"the model cannot be made: {type(error).__name__}: {error}")
            return
        for system, result in self.results.items():
            engine = [str(model), dtype, choice.attention, str(rounds), str(result)]
            command = [sys.executable, __file__, "--worker", *engine]
            log = logs / f"architectures-{choice}-{system}.log"
            self.engines[system] = programs.start(f"{choice} {system}", command, environment(system), log)

    def ended(self, limit: float) -> bool:
        if time.monotonic() - self.begin > limit:
            return True
        return all(engine.process.poll() is not None for engine in self.engines.values())

    def row(self) -> dict[str, Any]:
        """Stops what still runs and gives the row of the CSV, without the machine's columns."""
        found, errors = {}, list(self.errors)
        for system, engine in self.engines.items():
            late = engine.process.poll() is None
            engine.stop()
            if self.results[system].is_file():
                found[system] = json.loads(self.results[system].read_text(encoding="utf-8"))
            else:
                errors.append(f"{system}: {'out of time' if late else last_error(engine.log)}")
        plain, kit = found.get(PLAIN, {}), found.get(KIT, {})
        return {
            "case": self.choice.name,
            "dtype": self.choice.dtype,
            "kit_backend": kit.get("backend", ""),
            "plain_backend": plain.get("backend", ""),
            "head_size": (kit or plain).get("head_size", ""),
            "answers": (kit or plain).get("answers", ""),
            "plain_tokens": plain.get("tokens", ""),
            "plain_logprobs": plain.get("logprobs", ""),
            "kit_tokens": kit.get("tokens", ""),
            "kit_logprobs": kit.get("logprobs", ""),
            "verdict": verdict(plain, kit),
            "seconds": round(time.monotonic() - self.begin, 1),
            "error": "; ".join(errors),
        }


def verdict(plain: dict[str, int], kit: dict[str, int]) -> str:
    """By the answers that differ of each; an engine without an answer is empty."""
    if kit and kit["logprobs"]:
        return "FAIL"
    if not (plain and kit):
        return "ERROR"
    return "PASS" if plain["logprobs"] else "INCONCLUSIVE"


def machine() -> dict[str, str]:
    """What the rows hold on; found without CUDA, of which every process would take its memory."""
    import torch
    import triton
    from vllm.version import __version__ as vllm

    gpu, driver = processor(), ""
    if torch.version.cuda:
        ask = ["nvidia-smi", "--id=0", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            gpu, driver = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip().split(", ")
        except (OSError, subprocess.CalledProcessError) as error:
            raise Failure(f"this torch is built for a GPU, of which nvidia-smi tells nothing: {error}") from None
    return {"gpu": gpu, "driver": driver, "vllm": vllm, "torch": torch.__version__, "triton": triton.__version__}


def trials(chosen: list[Choice], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of the CSV, in the order in which the cases end."""
    columns = machine()
    waiting, running = list(chosen), []
    with tempfile.TemporaryDirectory() as folder, Programs() as programs:
        while waiting or running:
            if waiting and len(running) < arguments.jobs:
                running.append(Trial(waiting.pop(0), arguments.rounds, Path(folder), arguments.logs, programs))
            for trial in [trial for trial in running if trial.ended(arguments.limit)]:
                running.remove(trial)
                yield columns | trial.row()
            time.sleep(LOOK_AGAIN)


def line(row: dict[str, Any]) -> str:
    said = f"{row['verdict']:12}  {row['case']:15} {row['dtype']:8}  {row['seconds']:4.0f} s  "
    if row["verdict"] == "ERROR":
        return said + row["error"]
    differ = (f"{system} {row[f'{system}_logprobs']:2} ({row[f'{system}_tokens']} in tokens)" for system in SYSTEMS)
    backends = " / ".join(dict.fromkeys(row[f"{system}_backend"] for system in SYSTEMS))
    return f"{said}of {row['answers']} differ: {', '.join(differ)}; head {row['head_size']}, {backends}"


def command(arguments: argparse.Namespace) -> int:
    chosen = [
        Choice(name, dtype, attention)
        for name in arguments.only
        for dtype in CASES[name].dtypes
        for attention in arguments.attention or [CASES[name].backend(dtype)]
        if dtype in arguments.dtypes
    ]
    if not chosen:
        raise Failure(f"--dtypes={' '.join(arguments.dtypes)!r} is not valid: no case of --only is tried in them")
    arguments.logs.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in kept(trials(chosen, arguments), arguments.out):
        rows.append(row)
        print(f"[{len(rows)}/{len(chosen)}] {line(row)}", flush=True)
    print("\nAnswers in a crowd that differ, in logprobs or tokens, from those alone:")
    tried = [(choice.name, choice.dtype) for choice in chosen]
    rows.sort(key=lambda row: tried.index((row["case"], row["dtype"])))
    print(*map(line, rows), sep="\n")
    counts = Counter(row["verdict"] for row in rows)
    print(", ".join(f"{count} {name}" for name, count in counts.items()), f"-> {arguments.out}")
    return int(any(counts[name] for name in FAILED))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    dtypes = list(dict.fromkeys(dtype for case in CASES.values() for dtype in case.dtypes))
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument(
        "--attention", nargs="+", choices=GPU_BACKENDS, help="on a GPU (default: what `auto` is for the case)"
    )
    parser.add_argument("--rounds", type=int, default=4, help="crowds that every prompt is asked in (default: 4)")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time, of two engines each (default: 1)")
    parser.add_argument("--limit", type=float, default=900, help="seconds that a case may take (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "evidence" / "architectures.csv")
    parser.add_argument("--logs", type=Path, default=ROOT / "benchmarks" / "results", help="the folder of the logs")
    arguments = parser.parse_args()
    if arguments.worker:
        model, dtype, attention, rounds, result = arguments.worker
        worker(model, dtype, attention, int(rounds), Path(result))
        return 0
    for option in ("rounds", "jobs"):
        if (value := getattr(arguments, option)) < 1:
            parser.error(f"--{option}={value} is not valid: at least 1 is needed")
    return run_command("architectures", lambda: command(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
