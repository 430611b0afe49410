"""Put the examples, the scripts that they use and the harness's fake server on the path."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("examples", "vllm", "tests/harness")]
