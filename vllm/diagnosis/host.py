"""The host around the container: the published port, who may reach it, and shared memory."""

import errno
import ipaddress
import os
import socket
from pathlib import Path

from diagnosis.finding import Finding, failure, gib, ok, warning
from diagnosis.settings import Settings
from healthcheck import healthy


def check_port(settings: Settings) -> Finding:
    """The port is free, or the server is already there."""
    family = socket.AF_INET6 if ":" in settings.bind else socket.AF_INET
    where = f"{settings.bind}:{settings.port}"
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.bind, settings.port))
            return ok("Port", f"{where} is free")
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
                return failure(
                    "Port", f"VLLM_BIND={settings.bind} is no address of this machine", "VLLM_BIND=127.0.0.1"
                )
            if error.errno == errno.EACCES:
                return failure("Port", f"{where} needs privileges that this user lacks", "VLLM_PORT=8000")
    if healthy(loopback_of(settings.bind), settings.port, seconds=2):
        return ok("Port", f"{where} is taken by a server that answers /health: one is already running")
    return failure(
        "Port", f"{where} is taken by another program", f"VLLM_PORT={settings.port + 1}, or stop that program"
    )


def loopback_of(bind: str) -> str:
    """An address to connect to for one that was bound: 0.0.0.0 and :: stand for every address."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)


def check_exposure(settings: Settings) -> Finding:
    """Beyond this machine an API key is asked for."""
    try:
        local = settings.bind == "localhost" or ipaddress.ip_address(settings.bind).is_loopback
    except ValueError:
        return failure("API key", f"VLLM_BIND={settings.bind} is no IP address", "VLLM_BIND=127.0.0.1")
    if os.environ.get("VLLM_API_KEY"):
        return ok("API key", "set; requests without it are refused")
    if local:
        return ok("API key", f"none, and the port is only reachable from this machine ({settings.bind})")
    return failure(
        "API key",
        f"VLLM_BIND={settings.bind} lets other machines in, and no VLLM_API_KEY is set",
        "export VLLM_API_KEY=$(openssl rand -hex 32)",
    )


def check_shared_memory(settings: Settings, meminfo: Path = Path("/proc/meminfo")) -> Finding:
    """The container's /dev/shm is memory: its limit should fit into what the host has."""
    try:
        lines = meminfo.read_text().splitlines()
        total = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal")) * 1024
    except (OSError, StopIteration):
        return warning(
            "Shared memory", f"{meminfo} tells nothing of this machine's memory", "run it on the Docker host"
        )
    if settings.shm_bytes < 2**30:
        return failure(
            "Shared memory",
            f"VLLM_SHM_SIZE is {gib(settings.shm_bytes)}: vLLM's processes exchange tensors there",
            "VLLM_SHM_SIZE=16g",
        )
    if settings.shm_bytes > total:
        fitting = max(1, total // 2**31)
        return warning(
            "Shared memory",
            f"VLLM_SHM_SIZE is {gib(settings.shm_bytes)}, more than this machine's {gib(total)} of memory",
            f"VLLM_SHM_SIZE={fitting}g",
        )
    return ok("Shared memory", f"up to {gib(settings.shm_bytes)} of this machine's {gib(total)}")
