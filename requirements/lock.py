#!/usr/bin/env python3
"""Write the lock file of a GPU stack: every package with its version and the hashes of the wheels that fit.

    python requirements/lock.py cuda12 cuda13      needs Python 3.11 and uv on PATH

A stack is what vLLM's release asks for, as the package index stood at `as_of`: shortly after that release, so that it
is the set its authors tested. One file serves the Pythons that the base images bring; where they need different
versions, the lines carry a marker. Wheels of other platforms are left out, source archives too.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

HERE = Path(__file__).resolve().parent
PYTHONS = ("3.10", "3.11", "3.12")
PLATFORM = "x86_64-manylinux_2_35"
STACKS = {
    "cuda12": ("vllm==0.19.1", "2026-05-01"),
    "cuda13": ("vllm==0.26.0", "2026-08-08"),
}


def resolve(requirement: str, as_of: str, python: str) -> dict[tuple[str, str], set[str]]:
    """The packages for one Python: (name, version) and the sha256 hashes of its wheels."""
    with tempfile.TemporaryDirectory() as folder:
        source, lock = Path(folder, "stack.in"), Path(folder, "pylock.toml")
        source.write_text(requirement + "\n")
        options = ["--python-version", python, "--python-platform", PLATFORM, "--exclude-newer", as_of, "--quiet"]
        command = ["uv", "pip", "compile", source, "--format", "pylock.toml", "--output-file", lock, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        packages = tomllib.loads(lock.read_text())["packages"]
    without_wheel = [package["name"] for package in packages if not package.get("wheels")]
    if without_wheel:
        raise SystemExit(f"lock: {', '.join(without_wheel)} would have to be built from source for Python {python}")
    return {
        (package["name"], package["version"]): {wheel["hashes"]["sha256"] for wheel in package["wheels"]}
        for package in packages
    }


def write(stack: str) -> None:
    requirement, as_of = STACKS[stack]
    merged: dict[tuple[str, str], tuple[list[str], set[str]]] = {}
    for python in PYTHONS:
        for package, hashes in resolve(requirement, as_of, python).items():
            pythons, known = merged.setdefault(package, ([], set()))
            pythons.append(python)
            known |= hashes
    lines = [f"# {requirement} as of {as_of}, for Python {', '.join(PYTHONS)} on Linux x86_64: requirements/lock.py"]
    for (name, version), (pythons, hashes) in sorted(merged.items()):
        marker = (
            "" if len(pythons) == len(PYTHONS) else " ; " + " or ".join(f"python_version == '{p}'" for p in pythons)
        )
        lines.append(f"{name}=={version}{marker}" + "".join(f" \\\n    --hash=sha256:{h}" for h in sorted(hashes)))
    (HERE / f"{stack}.txt").write_text("\n".join(lines) + "\n")
    print(f"requirements/{stack}.txt: {len(merged)} packages")


if __name__ == "__main__":
    unknown = [stack for stack in sys.argv[1:] if stack not in STACKS]
    if unknown or not sys.argv[1:]:
        raise SystemExit(f"lock: name the stacks to lock: {', '.join(STACKS)}")
    for name in sys.argv[1:]:
        write(name)
