"""Docker: the client, the engine, BuildKit, Compose, and the disk that the image needs."""

import shutil
from pathlib import Path

from diagnosis.finding import Finding, ask, failure, gib, ok, version_in, warning
from diagnosis.settings import Settings

INSTALL_DOCKER = "https://docs.docker.com/engine/install/"


def check_engine() -> list[Finding]:
    """The client and the engine answer, and both are 20.10 or newer."""
    client = ask("docker", "version", "--format", "{{.Client.Version}}")
    if client.status == 127:
        return [failure("Docker", "docker is not installed", f"install it: {INSTALL_DOCKER}")]
    server = ask("docker", "version", "--format", "{{.Server.Version}}")
    if server.status != 0:
        return [engine_out_of_reach(server.last_line)]
    version = version_in(server.text)
    if version < (20, 10):
        return [
            failure("Docker", f"the engine is {server.text}; 20.10 or newer is needed", f"update: {INSTALL_DOCKER}")
        ]
    return [ok("Docker", f"engine {server.text} (20.10 or newer is needed)"), check_buildkit()]


def engine_out_of_reach(why: str) -> Finding:
    if "permission denied" in why.lower():
        return failure(
            "Docker", "this user may not talk to the engine", "sudo usermod -aG docker $USER, then log in again"
        )
    return failure("Docker", f"the engine does not answer: {why}", "sudo systemctl start docker")


def check_buildkit() -> Finding:
    """Clients from 23 on build through the buildx plugin; older ones have BuildKit inside."""
    client = version_in(ask("docker", "version", "--format", "{{.Client.Version}}").text)
    if client < (23,):
        return ok("BuildKit", "part of this client")
    buildx = ask("docker", "buildx", "version")
    if buildx.status != 0:
        return failure(
            "BuildKit",
            "this client needs the buildx plugin to build, and it is missing",
            "sudo apt-get install docker-buildx-plugin (docker-buildx on Debian and Ubuntu's own packages)",
        )
    return ok("BuildKit", buildx.text.splitlines()[0])


def check_compose() -> Finding:
    """Compose v2, or 1.28 and newer, the first that reserves GPUs without swarm mode."""
    plugin = ask("docker", "compose", "version", "--short")
    if plugin.status == 0 and version_in(plugin.text) >= (2,):
        return ok("Compose", f"docker compose {plugin.text}")
    old = ask("docker-compose", "version", "--short")
    mend = "sudo apt-get install docker-compose-plugin"
    if old.status != 0:
        return failure("Compose", "neither `docker compose` nor `docker-compose` is installed", mend)
    if version_in(old.text) < (1, 28):
        return failure("Compose", f"docker-compose {old.text} cannot reserve GPUs; 1.28 or newer is needed", mend)
    return ok("Compose", f"docker-compose {old.text}")


def check_disk(settings: Settings, model_bytes: int | None, model_is_there: bool) -> list[Finding]:
    """Room for the image where Docker keeps its data, and for the model in the Hugging Face cache."""
    findings = []
    root = ask("docker", "info", "--format", "{{.DockerRootDir}}")
    has_image = ask("docker", "image", "inspect", "--format", "{{.Id}}", settings.image).status == 0
    if root.status == 0 and Path(root.text).is_dir():
        # A build holds the downloaded wheels beside the unpacked ones.
        needed = 0 if has_image else settings.stack.image_bytes * 2
        findings.append(
            room("Disk for the image", Path(root.text), needed, "docker system prune, or a larger disk for Docker")
        )
    if model_is_there:
        return findings
    if model_bytes is None:
        free = shutil.disk_usage(nearest_folder(settings.hf_cache)).free
        mend = "compare it with the model's size on its page"
        return [*findings, warning("Disk for the model", f"{gib(free)} free at {settings.hf_cache}", mend)]
    mend = "free some, or set HF_CACHE to another disk"
    return [*findings, room("Disk for the model", settings.hf_cache, model_bytes, mend)]


def nearest_folder(path: Path) -> Path:
    """The path itself, or the closest folder above it that is there."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())


def room(subject: str, folder: Path, needed: int, mend: str) -> Finding:
    free = shutil.disk_usage(nearest_folder(folder)).free
    text = f"{gib(free)} free at {folder}"
    if free < needed:
        return failure(subject, f"{text}, {gib(needed)} are needed", mend)
    if free < needed + 2**30:
        return warning(subject, f"{text}: compile caches and logs need about one GiB", mend)
    return ok(subject, f"{text}, {gib(needed)} are needed" if needed else f"{text}, and the image is there")
