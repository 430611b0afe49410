"""Each setting reaches the server's container from make's command line, the environment and vllm/.env."""

import re
import shlex

import pytest
from kit import IMAGE, NAME, ROOT, docker, free_port, inspect

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]
GIVEN = {
    "MAX_MODEL_LEN": "1234",
    "HF_TOKEN": "hf_given",
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ATTENTION_BACKEND": "CPU_ATTN",
    "VLLM_BIND": "127.0.0.1",
    "CUBLAS_WORKSPACE_CONFIG": ":32:4",
    "VLLM_API_KEY": "a key with $signs and #marks",
    "BATCH_INVARIANT": "0",
    "BATCH_INVARIANT_LOG": "debug",
    "BATCH_INVARIANT_GEMM": "triton",
    "BATCH_INVARIANT_ALLOW_UNPROVEN": "1",
    "TENSOR_PARALLEL_SIZE": "2",
    "GPU_MEMORY_UTILIZATION": "0.5",
    "DTYPE": "float32",
    "SERVED_MODEL_NAME": "given-name",
    "VLLM_EXTRA_ARGS": "--max-num-seqs 7 --seed 3",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "DRAIN_SECONDS": "4",
}
MODEL = "/models/none"  # refused at once: what the container was given is looked at, not what it serves


def settings_of_the_makefile() -> list[str]:
    text = (ROOT / "docker.mk").read_text().replace("\\\n", " ")
    return re.findall(r"^server_settings := (.*)$", text, re.MULTILINE)[0].split()


def test_no_setting_of_the_server_is_left_out_here():
    assert set(settings_of_the_makefile()) == {*GIVEN, "MODEL_NAME"}


@pytest.fixture
def dotenv(kit):
    """Write vllm/.env for one test."""
    path = kit.folder / "vllm" / ".env"
    before = path.read_text()
    yield lambda settings: path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    path.write_text(before)


@pytest.mark.parametrize("place", ["command line", "environment", ".env"])
@pytest.mark.parametrize("target", ["vllm-run-detached", "vllm-compose-up-detached"])
def test_every_setting_reaches_the_container(nothing_running, dotenv, target, place):
    kit, port = nothing_running, free_port()
    given = GIVEN | {"VLLM_MODEL": MODEL, "VLLM_PORT": port, "VLLM_IMAGE": IMAGE}
    dotenv(given if place == ".env" else {})
    for_make = [f"{name}={value}" for name, value in given.items()] if place == "command line" else []
    kit.make(target, "NO_BUILD=1", *for_make, **(given if place == "environment" else {}))
    seen = environment_of(NAME)
    expected = {name: given[name] for name in GIVEN} | {"MODEL_NAME": MODEL}
    assert {name: seen.get(name) for name in expected} == expected
    assert f"{{127.0.0.1 {port}}}" in inspect(NAME, "{{.HostConfig.PortBindings}}")


def environment_of(name: str) -> dict[str, str]:
    """What a container or an image has in its environment."""
    return dict(line.partition("=")[::2] for line in inspect(name, "{{join .Config.Env `\n`}}").splitlines())


@pytest.mark.parametrize("target", ["vllm-run-detached", "vllm-compose-up-detached"])
def test_what_is_not_set_stays_as_the_image_sets_it(nothing_running, dotenv, target):
    dotenv({})
    kit = nothing_running
    kit.make(target, "NO_BUILD=1", f"VLLM_MODEL={MODEL}", f"VLLM_IMAGE={IMAGE}", f"VLLM_PORT={free_port()}")
    image, seen = environment_of(IMAGE), environment_of(NAME)
    assert {name: seen.get(name) for name in image} == image


def run_line(kit, *arguments: str, **env: str) -> list[str]:
    shown = kit.make("--dry-run", "vllm-run-detached", *arguments, **env)
    return shlex.split(next(line for line in shown.splitlines() if line.startswith("docker run")))


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(kit, dotenv):
    dotenv({"VLLM_PORT": "8101", "VLLM_IMAGE": "from:file"})
    assert "127.0.0.1:8101:8000" in run_line(kit)
    assert "127.0.0.1:8102:8000" in run_line(kit, VLLM_PORT="8102")
    line = run_line(kit, "VLLM_PORT=8103", VLLM_PORT="8102")
    assert "127.0.0.1:8103:8000" in line and line[-1] == "from:file"


@pytest.mark.parametrize("stack, image", [("cuda12", "latest"), ("cuda13", "cuda13"), ("cpu", "cpu")])
def test_the_stack_decides_the_image_and_whether_a_gpu_is_asked_for(kit, dotenv, stack, image):
    dotenv({})
    for line in (run_line(kit, f"STACK={stack}"), run_line(kit, STACK=stack)):
        assert line[-1] == f"vllm-batch-invariant:{image}" and ("--gpus" in line) == (stack != "cpu")
    build = kit.make("--dry-run", "vllm-build", f"STACK={stack}")
    assert f"--build-arg STACK={stack}" in build and f"-t vllm-batch-invariant:{image} " in build


def test_a_folder_with_a_model_is_mounted_and_served(kit, dotenv, tmp_path):
    dotenv({})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    line = run_line(kit, f"VLLM_MODEL={tmp_path}/mine")
    assert f"{tmp_path}:/models:ro" in line
    kit.make("vllm-stop")
    kit.make("vllm-run-detached", f"VLLM_MODEL={tmp_path}/mine", f"VLLM_IMAGE={IMAGE}", f"VLLM_PORT={free_port()}")
    assert "MODEL_NAME=/models/mine" in inspect(NAME, "{{.Config.Env}}")
    kit.make("vllm-stop")
    assert not docker("ps", "--quiet", "--filter", f"name={NAME}")
