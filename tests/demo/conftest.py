"""Put the scripts' folder on the path, and make reports as the harness writes them."""

import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "vllm"))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture
def harness_report():
    """A function that gives a report of schema 1; `changed` is how many of 48 requests differ from solo."""

    def make(verdict: str, changed: int = 0, **overrides: object) -> dict:
        draw = random.Random(7)
        differences = [draw.uniform(1e-4, 3e-2) for _ in range(changed)] + [0.0] * (48 - changed)
        divergence = {"request": 3, "prompt_id": 1, "token_index": 9, "token_a": " abc", "token_b": "<script>"}
        divergence |= {"what": "token", "character": None, "ulps": None}
        return {
            "schema": 1,
            "url": "http://127.0.0.1:8000",
            "model": "demo",
            "level": "logprobs",
            "levels_offered": ["text", "tokens", "logprobs"],
            "requests": 48,
            "concurrency": 16,
            "max_tokens": 32,
            "seed": 0,
            "verdict": verdict,
            "answered": 48,
            "reason": "",
            "text_variants": 1,
            "token_variants": 1 + (changed > 0),
            "logprob_variants": 1 + changed // 4,
            "identical_to_solo": 48 - changed,
            "retried_connections": 0,
            "solo_seconds": 3.5,
            "loaded_seconds": 11.25,
            "divergences": [{**divergence, "logprob_a": -1.25, "logprob_b": -1.5}] if changed else [],
            "logprob_differences": differences,
            "latencies": {
                "solo": [draw.uniform(0.3, 0.5) for _ in range(6)],
                "loaded": [draw.uniform(2.0, 4.0) for _ in range(48)],
            },
            "prompts": [{"id": n, "prompt_tokens": 32 * 4**n, "requests": 12, "identical": 12} for n in range(4)],
            "control": None,
            "server": {"version": "0.32.0"},
            **overrides,
        }

    return make
