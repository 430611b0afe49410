"""What the harness's tests share: how it is run, and two loads that it is run with."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "vllm" / "test_determinism.py")]
SHORT = ("--requests", "100", "--concurrency", "10", "--max-tokens", "16")
ONE_PROMPT_TOKENS = 64
ONE_PROMPT = ("--prompt", "one river two roads", "--background", "0", "--max-tokens", str(ONE_PROMPT_TOKENS))
"""With this load request 0 is the probe, 1 the prompt alone, and from 2 on each is a copy under load."""


def environment(**settings: str) -> dict[str, str]:
    """This process's, without what would change the harness's own defaults."""
    dropped = ("VLLM_PORT", "VLLM_API_KEY", "NO_COLOR")
    return {name: value for name, value in os.environ.items() if name not in dropped} | settings
