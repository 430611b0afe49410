"""The server's settings: environment variables, read and checked before anything is started."""

import ipaddress
import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPU_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION")
DTYPES = ("auto", "bfloat16", "float16", "half", "float32", "float")
LOG_LEVELS = ("debug", "info", "warning", "error")
# rotary embeddings whose max_position_embeddings is the end; the others' is multiplied by their factor
ROPE_THAT_LIMITS = ("default", "llama3", "longrope", "su")
OWN_FLAGS = {
    "--host": "VLLM_HOST",
    "--port": "VLLM_PORT",
    "--api-key": "VLLM_API_KEY, which keeps the key out of the process list",
    "--model": "MODEL_NAME",
    "--max-model-len": "MAX_MODEL_LEN",
    "--attention-backend": "VLLM_ATTENTION_BACKEND",
    "--dtype": "DTYPE",
    "--served-model-name": "SERVED_MODEL_NAME",
    "--tensor-parallel-size": "TENSOR_PARALLEL_SIZE",
    "-tp": "TENSOR_PARALLEL_SIZE",
    "--gpu-memory-utilization": "GPU_MEMORY_UTILIZATION",
}


class BadSetting(ValueError):
    """A setting that cannot work; its text is the line the user reads."""

    def __init__(self, name: str, value: object, valid: str) -> None:
        super().__init__(f"{name}={value!r} is not valid: {valid}")


def whole_number(name: str, value: str, low: int, high: int, unit: str) -> int:
    if not re.fullmatch(r"\d{1,12}", value) or not low <= int(value) <= high:
        raise BadSetting(name, value, f"{unit} from {low} to {high} is needed")
    return int(value)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise BadSetting(name, value, f"one of {', '.join(choices)} is needed")
    return value


@dataclass(frozen=True)
class Settings:
    """What the environment asks for, checked; `None` leaves a choice to vLLM."""

    model: str
    host: str
    port: int
    batch_invariant: bool
    attention_backend: str
    max_model_len: int | None
    tensor_parallel_size: int | None
    gpu_memory_utilization: float | None
    dtype: str | None
    served_model_name: str | None
    api_key_set: bool
    extra_args: tuple[str, ...]

    @classmethod
    def read(cls, env: dict[str, str]) -> "Settings":
        """Read and check every variable.

        Raises:
            BadSetting: for the first variable that cannot work.
        """

        def get(name: str, default: str = "") -> str:
            return env.get(name, "").strip() or default

        def optional(name: str, check: Callable[[str, str], object]):
            return check(name, get(name)) if get(name) else None

        one_of("BATCH_INVARIANT_LOG", get("BATCH_INVARIANT_LOG", "info"), LOG_LEVELS)
        workspace = get("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        if not re.fullmatch(r"(:\d+:\d+)+", workspace):
            raise BadSetting("CUBLAS_WORKSPACE_CONFIG", workspace, "pairs :KiB:count are needed, like :16:8")
        bind = get("VLLM_BIND")
        host = get("VLLM_HOST", bind or "127.0.0.1")
        check_exposure("VLLM_BIND" if bind else "VLLM_HOST", bind or host, bool(get("VLLM_API_KEY")))
        model = checked_model(get("MODEL_NAME", "meta-llama/Llama-3.1-8B-Instruct"))
        return cls(
            model=model,
            host=host,
            port=whole_number("VLLM_PORT", get("VLLM_PORT", "8000"), 1, 65535, "a port number"),
            batch_invariant=one_of("BATCH_INVARIANT", get("BATCH_INVARIANT", "1"), ("0", "1")) == "1",
            attention_backend=one_of(
                "VLLM_ATTENTION_BACKEND",
                get("VLLM_ATTENTION_BACKEND", "auto"),
                ("auto", *GPU_BACKENDS, "CPU_ATTN"),
            ),
            max_model_len=optional("MAX_MODEL_LEN", lambda n, v: checked_length(n, v, model)),
            tensor_parallel_size=optional(
                "TENSOR_PARALLEL_SIZE", lambda n, v: whole_number(n, v, 1, 1024, "a whole number of GPUs")
            ),
            gpu_memory_utilization=optional("GPU_MEMORY_UTILIZATION", fraction),
            dtype=optional("DTYPE", lambda n, v: one_of(n, v, DTYPES)),
            served_model_name=get("SERVED_MODEL_NAME") or None,
            api_key_set=bool(get("VLLM_API_KEY")),
            extra_args=checked_extra_args(get("VLLM_EXTRA_ARGS")),
        )


def fraction(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 < number <= 1:
        raise BadSetting(name, value, "a fraction of the GPU's memory above 0 and up to 1 is needed, like 0.9")
    return number


def check_exposure(name: str, host: str, has_key: bool) -> None:
    """Whoever can reach the port can use the GPU: beyond this machine, a key is asked for."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        raise BadSetting(name, host, "an IP address of this machine is needed, like 127.0.0.1 or 0.0.0.0") from None
    if not local and not has_key:
        raise BadSetting(name, host, "an address beyond this machine needs VLLM_API_KEY to be set")


def checked_model(name: str) -> str:
    """A folder that holds a model, or a hub id: the folder is looked into here, the hub is vLLM's to ask."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        read_config(folder)
        return str(folder)
    if name.startswith(("/", "./", "../", "~")):
        raise BadSetting("MODEL_NAME", name, "there is no such folder; a folder or a hub id is needed")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII):
        raise BadSetting("MODEL_NAME", name, "a folder or a hub id like meta-llama/Llama-3.1-8B-Instruct is needed")
    return name


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, or the part of it that describes the language model.

    Raises:
        BadSetting: there is none, or it is none.
    """
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return dict(content.get("text_config", content))
    except FileNotFoundError:
        reason = "the folder holds no config.json, so it is no Hugging Face model"
    except (OSError, TypeError, ValueError, AttributeError) as error:
        reason = f"the folder's config.json cannot be read ({error}): a Hugging Face model is needed"
    raise BadSetting("MODEL_NAME", str(folder), reason)


def checked_length(name: str, value: str, model: str) -> int:
    """A context length that the model's positions allow; where its config stretches them, vLLM counts them."""
    length = whole_number(name, value, 1, 10**9, "a whole number of tokens")
    if Path(model).is_dir() and os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") != "1":
        config = read_config(Path(model))
        limit = config.get("max_position_embeddings")
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {"rope_type": "default"}
        is_stretched = rope.get("rope_type", rope.get("type")) not in ROPE_THAT_LIMITS
        if limit and length > max(limit, config.get("model_max_length") or 0) and not is_stretched:
            raise BadSetting(name, value, f"the model in {model} has {limit} positions, so at most {limit} is needed")
    return length


def checked_extra_args(text: str) -> tuple[str, ...]:
    try:
        arguments = tuple(shlex.split(text))
    except ValueError as error:
        raise BadSetting(
            "VLLM_EXTRA_ARGS", text, f"{error}; arguments are needed as a shell would split them"
        ) from None
    for argument in arguments:
        setting = OWN_FLAGS.get(argument.split("=")[0].replace("_", "-"))
        if setting:
            raise BadSetting("VLLM_EXTRA_ARGS", argument.split("=")[0], f"set {setting} instead")
    return arguments
