#!/usr/bin/env python3
"""Start the deterministic, OpenAI-compatible vLLM server: read the environment, check it, run `vllm serve`.

Every setting is an environment variable, so that a shell, Docker, Compose and Make set it the same way. A value that
cannot work is refused before anything is started: one line that names the setting, its value and what is valid, and
exit status 2. What will run is printed first. With --check, that is all.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from serve_settings import GPU_BACKENDS, BadSetting, Settings

HERE = Path(__file__).resolve().parent
SUPPORTED_RELEASES = ("0.19.1", "0.26.0", "0.32.0")
# to vLLM, VLLM_PORT is an internal port, and the others are unknown variables to warn of
NOT_FOR_VLLM = {"VLLM_PORT", "VLLM_HOST", "VLLM_BIND", "VLLM_ATTENTION_BACKEND", "VLLM_EXTRA_ARGS"}
MIDDLEWARE = "batch_invariant_ops.integrations.fingerprint.FingerprintMiddleware"
SWITCHES_OF_THE_MODE = {
    "VLLM_BATCH_INVARIANT": "1",
    "VLLM_CPU_ATTN_SPLIT_KV": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":16:8",
    "CUBLASLT_WORKSPACE_SIZE": "1",
}


@dataclass(frozen=True)
class Installed:
    """The vLLM in this Python: its distribution's name, its release, and whether it is a CPU build."""

    name: str
    release: str
    is_cpu: bool

    @classmethod
    def find(cls) -> "Installed":
        for name in ("vllm", "vllm-cpu"):
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            return cls(name, version.split("+")[0], name == "vllm-cpu" or "+cpu" in version)
        raise SystemExit(
            f"serve: no vLLM is installed for {sys.executable}: install one of {', '.join(SUPPORTED_RELEASES)}, "
            "or run `make demo`, which installs it for the CPU"
        )


def check_installed(settings: Settings, installed: Installed) -> None:
    """Refuse what this release cannot do; without the mode, any release may serve."""
    backend = settings.attention_backend
    if installed.is_cpu and backend in GPU_BACKENDS:
        raise BadSetting("VLLM_ATTENTION_BACKEND", backend, "this is vLLM's CPU build: auto or CPU_ATTN is needed")
    if not installed.is_cpu and backend == "CPU_ATTN":
        raise BadSetting(
            "VLLM_ATTENTION_BACKEND", backend, f"this vLLM is built for GPUs: one of {GPU_BACKENDS} is needed"
        )
    if not settings.batch_invariant:
        return
    if installed.release not in SUPPORTED_RELEASES:
        raise SystemExit(
            f"serve: vLLM {installed.release} is not supported in batch-invariant mode: "
            f"one of {', '.join(SUPPORTED_RELEASES)} is needed, or BATCH_INVARIANT=0 for plain vLLM"
        )
    if backend == "FLEX_ATTENTION" and installed.release == "0.19.1":
        raise BadSetting(
            "VLLM_ATTENTION_BACKEND",
            backend,
            "vLLM 0.19.1 refuses it in batch-invariant mode, because of an illegal memory access that it knows of; "
            "FLASH_ATTN or TRITON_ATTN is needed, or the cuda13 stack, where it works",
        )
    if not installed.is_cpu and importlib.util.find_spec("triton") is None:
        raise SystemExit("serve: Triton is not installed beside this torch: `pip install triton` is needed")


def check_port(settings: Settings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise BadSetting(
                "VLLM_PORT", settings.port, f"{settings.host}:{settings.port} cannot be listened on ({error.strerror})"
            ) from None


def command(settings: Settings, installed: Installed) -> list[str]:
    """The `vllm serve` that gives these settings; the API key and the token travel in the environment."""
    argv = [sys.executable, "-m"]
    if installed.name == "vllm":
        argv += ["vllm.entrypoints.cli.main", "serve", settings.model]
    else:  # the command line asks for the version of a distribution named vllm, and stops where it has another name
        argv += ["vllm.entrypoints.openai.api_server", "--model", settings.model]
    argv += ["--host", settings.host, "--port", str(settings.port), "--middleware", MIDDLEWARE]
    if settings.attention_backend in GPU_BACKENDS:
        argv += ["--attention-backend", settings.attention_backend]
    for flag, value in (
        ("--max-model-len", settings.max_model_len),
        ("--tensor-parallel-size", settings.tensor_parallel_size),
        ("--gpu-memory-utilization", settings.gpu_memory_utilization),
        ("--dtype", settings.dtype),
        ("--served-model-name", settings.served_model_name),
    ):
        if value is not None:
            argv += [flag, str(value)]
    return [*argv, *settings.extra_args]


def environment(settings: Settings, env: dict[str, str]) -> dict[str, str]:
    """The server's environment: the hook's folder on the path, and the mode's switches on, or off for the control."""
    env = {name: value for name, value in env.items() if name not in NOT_FOR_VLLM}
    own_path = [str(HERE)]
    if importlib.util.find_spec("batch_invariant_ops") is None:
        own_path.append(str(HERE.parent))
    env["PYTHONPATH"] = os.pathsep.join([*own_path, *filter(None, [env.get("PYTHONPATH")])])
    if settings.batch_invariant:
        return env | {"BATCH_INVARIANT": "1"} | {name: env.get(name) or v for name, v in SWITCHES_OF_THE_MODE.items()}
    return {name: v for name, v in env.items() if SWITCHES_OF_THE_MODE.get(name) != v} | {"BATCH_INVARIANT": "0"}


def describe(settings: Settings, installed: Installed, argv: list[str]) -> str:
    mode = "on" if settings.batch_invariant else "off: plain vLLM, whose answers may depend on the load"
    build = "CPU build" if installed.is_cpu else "GPU build"
    return "\n".join(
        [
            f"vLLM               {installed.release}, {build}",
            f"batch invariance   {mode}",
            f"model              {settings.model}",
            f"address            http://{settings.host}:{settings.port}",
            f"API key            {'asked for' if settings.api_key_set else 'none'}",
            f"command            {shlex.join(argv)}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check the settings, print what would run, and stop")
    arguments = parser.parse_args()
    try:
        settings = Settings.read(dict(os.environ))
        installed = Installed.find()
        check_installed(settings, installed)
        check_port(settings)
    except BadSetting as error:
        print(f"serve: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    argv = command(settings, installed)
    print(describe(settings, installed, argv), flush=True)
    if not arguments.check:
        os.execve(argv[0], argv, environment(settings, dict(os.environ)))


if __name__ == "__main__":
    main()
