"""What a worker process found out, told to the process that answers requests, through one small file.

The file's name travels in the environment, which forked and spawned processes inherit; its content is JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

VARIABLE = "BATCH_INVARIANT_STATUS_FILE"


def announce() -> None:
    """Choose the file in the first process, before any other is started; later calls keep the choice."""
    os.environ.setdefault(VARIABLE, str(Path(tempfile.gettempdir(), f"batch_invariant_{os.getpid()}.json")))


def write(status: dict[str, Any]) -> None:
    """Replace the file's content at once; a folder that cannot be written is no reason to stop serving."""
    name = os.environ.get(VARIABLE)
    if not name:
        return
    with contextlib.suppress(OSError):
        unfinished = Path(f"{name}.{os.getpid()}")
        unfinished.write_text(json.dumps(status), encoding="utf-8")
        unfinished.replace(name)


def read() -> dict[str, Any]:
    """The file's content; empty where nothing, or nothing readable, was written."""
    try:
        content = json.loads(Path(os.environ.get(VARIABLE, "")).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
