"""What benchmarks in rounds share: a CSV that is written as the rounds end, and the processor's name for it."""

import csv
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def kept(rows: Iterable[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """The rows, each of which is in the CSV at `path` before the next round begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = None
        for row in rows:
            if table is None:
                table = csv.DictWriter(file, list(row))
                table.writeheader()
            table.writerow(row)
            file.flush()
            yield row
