"""The Compose file says the same to Compose v2 and to 1.29: both are asked, where they are installed."""

import json
import re
import shutil
import subprocess

import pytest
import yaml
from kit import ROOT

COMPOSE_FILE = ROOT / "vllm" / "docker-compose.yml"
SETTINGS = re.findall(r"^#?([A-Z_]+)=", (ROOT / "vllm" / ".env.example").read_text(), re.MULTILINE)
FOR_COMPOSE_ITSELF = {"STACK", "VLLM_IMAGE", "VLLM_PORT", "HF_CACHE", "VLLM_MODELS", "VLLM_USER", "VLLM_SHM_SIZE"}
FOR_COMPOSE_ITSELF |= {"STOP_GRACE_PERIOD", "PROMETHEUS_PORT", "GRAFANA_PORT", "GRAFANA_PASSWORD"}
GIB = 2**30


def first_line(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else ""


COMPOSE = {"1.29": ["docker-compose"], "v2": ["docker", "compose"]}
VERSIONS = {name: first_line(*command) for name, command in COMPOSE.items()}


@pytest.fixture(params=COMPOSE)
def compose(request, tmp_path, monkeypatch):
    """Read a Compose file with one of the two, with nothing set but what the test sets."""
    version = VERSIONS[request.param]
    if not version.lstrip("v").startswith(request.param.lstrip("v")):
        pytest.skip(f"`{' '.join(COMPOSE[request.param])}` {request.param} is not installed")
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "vllm"
    shutil.copytree(COMPOSE_FILE.parent / "monitoring", folder / "monitoring")
    shutil.copy(COMPOSE_FILE, folder)

    def read(change: tuple[str, str] = ("", ""), dotenv: str = "", **env: str) -> dict | str:
        file = folder / "docker-compose.yml"
        text = COMPOSE_FILE.read_text()
        assert change[0] in text
        file.write_text(text.replace(*change) if change[0] else text)
        (folder / ".env").write_text(dotenv)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        command = [*COMPOSE[request.param], "--profile", "cpu", "--profile", "monitoring", "config"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
        return yaml.safe_load(done.stdout) if done.returncode == 0 else done.stderr

    return read


def environment(service: dict) -> dict[str, str | None]:
    given = service["environment"]
    return given if isinstance(given, dict) else dict(line.partition("=")[::2] for line in given)


def test_it_is_valid_and_a_mistake_is_not(compose):
    assert set(compose()["services"]) == {"vllm", "vllm-cpu", "prometheus", "grafana"}
    assert isinstance(compose(("restart: unless-stopped", "restarts: unless-stopped")), str)


def test_the_gpu_is_reserved_and_the_cpu_service_beside_it_needs_none(compose):
    services = compose()["services"]
    (device,) = services["vllm"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"] and device["count"] in ("all", -1)
    assert not services["vllm-cpu"].get("deploy")
    assert services["vllm-cpu"]["profiles"] == ["cpu"] and not services["vllm"].get("profiles")


def test_what_both_servers_are_given(compose):
    for name in ("vllm", "vllm-cpu"):
        service = compose()["services"][name]
        assert service["restart"] == "unless-stopped" and service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["shm_size"] in ("16g", str(16 * GIB), 16 * GIB)
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "5"}
        assert "127.0.0.1" in json.dumps(service["ports"]) and "healthcheck.py" in service["healthcheck"]["test"]
        targets = json.dumps(service["volumes"])
        for folder in ("/root/.cache/huggingface", "/var/cache/batch-invariant", "/models"):
            assert folder in targets
        assert service["image"].startswith("vllm-batch-invariant:")


def test_the_defaults_are_those_of_the_example(compose):
    given = environment(compose()["services"]["vllm"])
    assert given["MODEL_NAME"] == "meta-llama/Llama-3.1-8B-Instruct" and given["BATCH_INVARIANT"] == "1"
    assert given["CUBLAS_WORKSPACE_CONFIG"] == ":16:8" and given["VLLM_ATTENTION_BACKEND"] == "auto"
    assert not given["HF_TOKEN"] and not given["VLLM_API_KEY"]


def test_the_example_copied_as_it_is_changes_nothing(compose):
    assert compose(dotenv=(COMPOSE_FILE.parent / ".env.example").read_text()) == compose()


@pytest.mark.parametrize("place", ["shell", ".env"])
def test_every_setting_of_the_example_is_taken(compose, place):
    values = {name: f"given-{name.lower()}" for name in SETTINGS} | {"VLLM_PORT": "8123", "VLLM_BIND": "127.0.0.9"}
    values |= {"VLLM_SHM_SIZE": "3g", "HF_CACHE": "/given-cache", "VLLM_MODELS": "/given-models"}
    values |= {"STOP_GRACE_PERIOD": "44s", "PROMETHEUS_PORT": "8124", "GRAFANA_PORT": "8125"}
    if place == "shell":
        services = compose(**values)["services"]
    else:
        services = compose(dotenv="".join(f"{name}={value}\n" for name, value in values.items()))["services"]
    for service in (services["vllm"], services["vllm-cpu"]):
        given = environment(service)
        inside = [name for name in SETTINGS if name not in FOR_COMPOSE_ITSELF]
        assert {name: given.get(name) for name in inside} == {name: values[name] for name in inside}
        text = json.dumps(service)
        for word in ("given-vllm_image", "8123", "127.0.0.9", "/given-cache", "/given-models", "44s"):
            assert word in text
        assert service["user"] == "given-vllm_user" and service["shm_size"] in ("3g", str(3 * GIB), 3 * GIB)
    assert "given-stack" in json.dumps(services["vllm"]["build"])
    assert "8124" in json.dumps(services["prometheus"]["ports"]) and "8125" in json.dumps(services["grafana"]["ports"])
    assert "given-grafana_password" in json.dumps(services["grafana"])
