"""Refuse to finish an image whose packages are not the ones that its stack names, or that would find the wrong vllm."""

import importlib.metadata
import importlib.util
import os
import site
from pathlib import Path


def problems() -> list[str]:
    """What is wrong with this image, one line each."""
    _, *pins = os.environ["BATCH_INVARIANT_STACK"].split()
    found = []
    for name, wanted in (pin.split("==") for pin in pins):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "nothing"
        if installed != wanted:
            found.append(f"{name} {wanted} is this stack's, and {installed} is installed: write a lock for it first")
    packages = [Path(folder) for folder in site.getsitepackages()]
    for name in ("vllm", "batch_invariant_ops"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not any(folder in Path(spec.origin).parents for folder in packages):
            found.append(f"`import {name}` would not find the installed package, but {spec}")
    return found


if __name__ == "__main__":
    raise SystemExit("\n".join(f"image: {problem}" for problem in problems()) or 0)
