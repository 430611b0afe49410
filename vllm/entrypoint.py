"""What the container runs: look for the GPU and at the caches, ask the hub for the model, run serve.py.

A GPU that is not there, a cache that cannot be written, or a model that the hub does not give, would end in a traceback
much later, from deep inside vLLM; it is refused here, in one line and with exit status 2. MODEL_NAME=demo stands for a
small random model, made once in the cache: the server then needs no GPU and no download. Arguments are serve.py's.
"""

import errno
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import supervisor

HERE = Path(__file__).resolve().parent
DEMO_MODEL = "demo"
DEFAULT_MODEL = "meta-llama/Llama-3.1-8B-Instruct"  # serve.py's
LEAST_FREE = 256 * 2**20  # compiled kernels and graphs of one model
LEAST_SHARED = 192 * 2**20  # vLLM's channel to a worker in a process of its own
LEAST_DRIVER = {"cuda12": 525, "cuda13": 580}
GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg")  # Linux, WSL 2


class Refused(Exception):
    """The container cannot serve like this; its text is the line the user reads."""


def check_gpu(stack: str) -> None:
    """A CUDA stack sees a GPU, and its driver is new enough; the cpu stack needs none.

    Raises:
        Refused: otherwise.
    """
    least = LEAST_DRIVER.get(stack)
    if least is None:
        return
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
        driver = re.match(r"(\d+)\.[\d.]+", answer.stdout) if answer.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        driver = None
    if driver is None and not any(map(os.path.exists, GPU_DEVICES)):
        raise Refused(
            "no NVIDIA GPU is in this container: start it with --gpus all, on a machine with the NVIDIA container "
            "toolkit, or build the image with STACK=cpu, which needs none"
        )
    if driver and int(driver[1]) < least:
        other = ", or use STACK=cuda12" if stack == "cuda13" and int(driver[1]) >= LEAST_DRIVER["cuda12"] else ""
        raise Refused(f"the NVIDIA driver is {driver[0]}, the {stack} stack needs {least} or newer: update it{other}")


def check_shared_memory(env: dict[str, str], folder: Path = Path("/dev/shm")) -> None:
    """There is room where vLLM's processes exchange tensors; Docker's own default is too little.

    Raises:
        Refused: otherwise.
    """
    is_cpu = env.get("BATCH_INVARIANT_STACK", "").startswith("cpu")
    if not is_cpu and env.get("TENSOR_PARALLEL_SIZE", "").strip() in ("", "1"):
        return  # one GPU: the engine's own process is the worker
    size = shutil.disk_usage(folder).total
    if size < LEAST_SHARED:
        raise Refused(
            f"{folder} has {size >> 20} MiB and {LEAST_SHARED >> 20} MiB are needed: start the container with "
            "--shm-size 16g"
        )


def check_cache(folder: Path, what: str, least_free: int = LEAST_FREE) -> None:
    """The folder is there, can be written, and has room.

    Raises:
        Refused: otherwise.
    """
    mend = f"mount a volume at {folder} that user {os.getuid()} can write"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 2**16)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Refused(f"the disk of {folder} ({what}) is full: free some, or mount a larger volume there") from None
        raise Refused(f"{folder} ({what}) cannot be written ({error.strerror}): {mend}") from None
    free = shutil.disk_usage(folder).free
    if free < least_free:
        raise Refused(
            f"the disk of {folder} ({what}) has {free >> 20} MiB left and {least_free >> 20} MiB are needed: "
            "free some, or mount a larger volume there"
        )


def is_downloaded(model: str, hub_cache: Path) -> bool:
    """The hub cache holds some version of the model; vLLM then needs no more than to read it."""
    return any((hub_cache / f"models--{model.replace('/', '--')}" / "snapshots").glob("*/config.json"))


def hub_answers(env: dict[str, str]) -> bool:
    """The hub can be connected to, as far as can be told: behind a proxy that is not tried."""
    if any(env.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    hub = urlsplit(env.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443)), 5).close()
    except (OSError, ValueError):
        return False
    return True


def ask_hub_for(model: str) -> None:
    """Fetch the model's config.json, a download of a few KB that shows whether the large one can work.

    Raises:
        Refused: with the reason, where the hub does not give it.
    """
    import huggingface_hub
    from huggingface_hub import errors

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each retry
    try:
        huggingface_hub.hf_hub_download(model, "config.json")
    except errors.GatedRepoError:
        raise Refused(f"MODEL_NAME={model!r} is gated: ask for access on its page, then set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise Refused(
            f"MODEL_NAME={model!r} is not at the hub, or private: a hub id that exists is needed, or HF_TOKEN for it"
        ) from None
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise Refused(
                f"MODEL_NAME={model!r} is not in the cache, and the hub cannot be reached: "
                "check the network and HF_TOKEN, or mount a folder with the model at /models"
            ) from None
    except errors.HfHubHTTPError as error:
        raise Refused(f"the hub refused MODEL_NAME={model!r}: {str(error).splitlines()[0]}") from None


def make_demo_model(folder: Path, preset: str) -> None:
    """Make a small random model where it is not there yet; an interrupted try leaves nothing that looks complete."""
    if (folder / "config.json").is_file():
        return
    print(f"entrypoint: making the small random model in {folder}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        made = Path(unfinished, "model")
        done = subprocess.run([sys.executable, HERE / "tiny_model.py", made, "--preset", preset])
        if done.returncode != 0:
            raise Refused(f"the small random model could not be made (exit status {done.returncode})")
        made.rename(folder)


def drain_seconds(env: dict[str, str]) -> int:
    """How long requests in flight may take to end once the container is stopped."""
    text = env.get("DRAIN_SECONDS", "").strip() or "5"
    if not re.fullmatch(r"\d{1,5}", text) or int(text) == 0:
        raise Refused(f"DRAIN_SECONDS={text!r} is not valid: a whole number of seconds from 1 to 99999 is needed")
    return int(text)


def with_drain(extra_args: str, seconds: int) -> str:
    if "--shutdown-timeout" in extra_args.replace("_", "-"):
        raise Refused("VLLM_EXTRA_ARGS='--shutdown-timeout' is not valid: set DRAIN_SECONDS instead")
    return f"--shutdown-timeout {seconds} {extra_args}".strip()


def prepare(env: dict[str, str]) -> dict[str, str]:
    """Check what the server will write to, and return the environment that it runs with.

    Raises:
        Refused: where it could not start.
    """
    stack = env.get("BATCH_INVARIANT_STACK", "").partition(" ")[0]
    check_gpu(stack)
    check_shared_memory(env)
    env = env | {"VLLM_EXTRA_ARGS": with_drain(env.get("VLLM_EXTRA_ARGS", ""), drain_seconds(env))}
    cache = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    check_cache(cache, "compile cache")
    model = env.get("MODEL_NAME", "").strip() or DEFAULT_MODEL
    if model == DEMO_MODEL:
        # on a GPU, heads of a size that FlashAttention is proven with
        name, preset = ("demo-model-gpu", "tiny-wide-heads") if stack.startswith("cuda") else ("demo-model", "tiny")
        folder = cache / name
        make_demo_model(folder, preset)
        return env | {"MODEL_NAME": str(folder), "SERVED_MODEL_NAME": env.get("SERVED_MODEL_NAME") or DEMO_MODEL}
    hub_cache = Path(env.get("HF_HOME") or cache / "huggingface") / "hub"
    if Path(model).is_dir():
        return env
    if is_downloaded(model, hub_cache):
        if not env.get("HF_HUB_OFFLINE") and not hub_answers(env):
            print(f"entrypoint: the hub cannot be reached, {model} is served from the cache", flush=True)
            env["HF_HUB_OFFLINE"] = "1"  # vLLM would ask the hub for the model's files and stop
    else:
        check_cache(hub_cache.parent, "Hugging Face cache")
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
            ask_hub_for(model)
    return env


def main() -> None:
    try:
        env = prepare(dict(os.environ))
    except Refused as refusal:
        print(f"entrypoint: {refusal}", file=sys.stderr)
        raise SystemExit(2) from None
    command = [sys.executable, str(HERE / "serve.py"), *sys.argv[1:]]
    raise SystemExit(supervisor.run(command, env, drain_seconds(env)))


if __name__ == "__main__":
    main()
