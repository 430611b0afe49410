"""The Docker commands of the documentation work as they are written; only the GPU, which is not here, is taken out."""

import re
import subprocess

import pytest
from kit import IMAGE, NAME, ROOT, docker, inspect

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]
DOCUMENTS = ("README.md", "QUICKSTART_VLLM.md", "vllm/README.md")
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
NO_HUB = "--env HF_ENDPOINT=http://127.0.0.1:9"
SHELL = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def commands(document: str) -> list[str]:
    """The shell commands of a document, continued lines joined, comments cut off."""
    text = "\n".join(SHELL.findall((ROOT / document).read_text())).replace("\\\n", " ")
    lines = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in text.splitlines())
    return [re.sub(r"\s+", " ", line) for line in lines if line]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_that_is_named_is_there(document):
    makefiles = (ROOT / "Makefile").read_text() + (ROOT / "docker.mk").read_text()
    targets = set(re.findall(r"^([a-z-]+):[^#=]*##", makefiles, re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", (ROOT / document).read_text()))
    named |= {word for line in commands(document) for word in re.findall(r"\bmake ([a-z-]+)", line)}
    assert named and named <= targets


def test_every_target_is_named_somewhere():
    text = "".join((ROOT / document).read_text() for document in DOCUMENTS)
    targets = re.findall(r"^(vllm-[a-z-]+):[^#=]*##", (ROOT / "docker.mk").read_text(), re.MULTILINE)
    assert len(targets) == 14 and [target for target in targets if f"make {target}" not in text] == []


def documented(start: str) -> str:
    found = {line for document in DOCUMENTS for line in commands(document) if line.startswith(start)}
    assert len(found) == 1, found
    return found.pop()


def plant_model(kit) -> None:
    """Put the small random model where a download of MODEL would be, so that its name is served without a hub."""
    folder = f"hub/models--{MODEL.replace('/', '--')}"
    cache = f"{kit.env['HOME']}/.cache/huggingface"
    script = f"mkdir -p {folder}/refs {folder}/snapshots && echo -n 1 >{folder}/refs/main"
    script += f" && python /opt/batch-invariant/vllm/tiny_model.py {folder}/snapshots/1"
    docker("run", "--rm", "--volume", f"{cache}:/cache", "--workdir", "/cache", IMAGE, "sh", "-c", script)


def test_the_plain_docker_commands_serve(nothing_running):
    kit = nothing_running
    build = documented("docker build -f Dockerfile.vllm -t vllm-batch-invariant:latest")
    assert build == "docker build -f Dockerfile.vllm -t vllm-batch-invariant:latest ."
    run = documented("docker run --gpus all -p 8000:8000")
    assert run == (
        "docker run --gpus all -p 8000:8000 -v ~/.cache/huggingface:/root/.cache/huggingface --shm-size 16g "
        f"-e MODEL_NAME={MODEL} vllm-batch-invariant:latest"
    )
    plant_model(kit)
    here = run.replace("--gpus all", f"--detach --name {NAME} {NO_HUB}").replace(
        "-p 8000:", f"-p 127.0.0.1:{kit.port}:"
    )
    here = here.replace("vllm-batch-invariant:latest", IMAGE)
    subprocess.run(here, shell=True, check=True, env=kit.env, stdout=subprocess.DEVNULL, timeout=60)
    kit.wait_ready()
    answer = kit.request("/v1/models", key=None)
    assert answer[0] == 200 and MODEL in answer[1]
    assert inspect(NAME, "{{.HostConfig.ShmSize}}") == str(16 * 2**30)
