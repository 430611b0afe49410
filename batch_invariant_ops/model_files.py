"""Which bytes a model is made of: SHA-256 of its weights, and of the settings and tokenizer that lie beside them.

All bytes are read. Sizes, headers and samples would miss what matters most here: a merged adapter or an edited layer
changes neither. Reading costs once: a file's hash is kept in the user's cache, by its path, size, inode and times of
change, and the first server of a model reads what vLLM has just put into the page cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from batch_invariant_ops.whole_files import write_whole

WEIGHTS = (("*.safetensors",), ("*.bin", "*.pt", "*.pth"), ("*.gguf",))
"""Kinds of weights; the first kind that a folder holds is the one that is loaded."""
INDEX = "model.safetensors.index.json"
SETTINGS = (
    *("config.json", "generation_config.json", "params.json", "hf_quant_config.json", "quantize_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "tekken.json", "chat_template.jinja", "chat_template.json", "*.py"),
)
THREADS = 4
PIECE = 1 << 22  # bytes read at a time


def weights(model: Path) -> str | None:
    """SHA-256, in hex, over the names and contents of a model's weights; None where there are none.

    Args:
        model: a folder, or one file that holds the whole model.

    Raises:
        OSError: one cannot be read.
    """
    return _hash(_weights(model))


def settings(folders: Iterable[Path]) -> str | None:
    """The same for the files that make text into tokens and weights into a network; None where there are none."""
    return _hash(file for folder in dict.fromkeys(folders) for name in SETTINGS for file in sorted(folder.glob(name)))


def _weights(model: Path) -> list[Path]:
    if model.is_file():
        return [model]
    for patterns in WEIGHTS:
        found = sorted(file for pattern in patterns for file in model.glob(pattern))
        if found:
            return _indexed(model / INDEX, found)
    return []


def _indexed(index: Path, files: list[Path]) -> list[Path]:
    """Those that the index names, where there is one: a folder may hold the same weights twice, in another layout."""
    try:
        named = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return files
    return [file for file in files if file.name in named] or files


def _hash(files: Iterable[Path]) -> str | None:
    found = list(files)
    if not found:
        return None
    with _remembered() as known, ThreadPoolExecutor(THREADS) as pool:
        hashes = list(pool.map(lambda file: _of_file(file, known), found))
    lines = [f"{content}  {file.name}\n" for file, content in zip(found, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _of_file(file: Path, known: dict[str, list[object]]) -> str:
    name = os.path.realpath(file)
    with open(name, "rb") as opened:
        stat = os.fstat(opened.fileno())
        state = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
        entry = known.get(name)
        if isinstance(entry, list) and entry[:-1] == state and isinstance(entry[-1], str):
            return entry[-1]
        found = hashlib.sha256()
        while piece := opened.read(PIECE):
            found.update(piece)
    known[name] = [*state, found.hexdigest()]
    return found.hexdigest()


def _cache() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "batch_invariant_ops", "model_files.json")


@contextlib.contextmanager
def _remembered() -> Iterator[dict[str, list[object]]]:
    """The hashes known so far, by path; what was added is kept, where there is a place to keep it."""
    known: dict[str, list[object]] = {}
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        content = json.loads(_cache().read_text(encoding="utf-8"))
        known = content if isinstance(content, dict) else {}
    before = dict(known)
    yield known
    if known != before:
        with contextlib.suppress(OSError, RuntimeError):
            write_whole(_cache(), json.dumps(known), mode=0o600)  # it names what lies where
