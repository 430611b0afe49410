#!/usr/bin/env python3
"""Test that a server gives the same answers under load as alone; --help says how.

    python vllm/test_determinism.py --requests 100 --concurrency 10

Needs Python 3.10 or newer and `pip install httpx`. The parts are in determinism/.
"""

import sys

try:
    import httpx  # noqa: F401
except ImportError:
    print("test_determinism: httpx is not installed: `pip install httpx` is needed", file=sys.stderr)
    raise SystemExit(2) from None

from determinism.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
