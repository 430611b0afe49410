"""What the doctor is asked about: the stack and the settings that a start would use, from the environment."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stack:
    """What a stack asks of the host. Sizes are bytes on disk, as `docker images` shows them."""

    vllm: str
    min_driver: int | None
    image_bytes: int


STACKS = {
    "cuda12": Stack("0.19.1", 525, 16 * 2**30),
    "cuda13": Stack("0.32.0", 580, 18 * 2**30),
    "cpu": Stack("0.32.0", None, 4 * 2**30),
}
DEMO_MODEL = "demo"
DTYPE_BYTES = {"float32": 4, "float": 4}


class BadSetting(ValueError):
    """A setting that cannot be understood; its text is the line the user reads."""


def number(name: str, text: str, kind: type, low: float, high: float):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise BadSetting(f"{name}={text!r} is not valid: a number from {low:g} to {high:g} is needed")
    return value


@dataclass(frozen=True)
class Settings:
    """The settings a start would use. `max_model_len` is None where the model's own length holds."""

    stack_name: str
    model: str
    port: int
    bind: str
    max_model_len: int | None
    tensor_parallel_size: int
    gpu_memory_utilization: float
    dtype_bytes: int
    shm_bytes: int
    token: str | None
    hub: str
    hf_cache: Path
    image: str

    @property
    def stack(self) -> Stack:
        return STACKS[self.stack_name]

    @classmethod
    def read(cls, env: dict[str, str]) -> "Settings":
        """
        Raises:
            BadSetting: for the first variable that cannot be understood.
        """

        def get(name: str, default: str) -> str:
            return env.get(name, "").strip() or default

        stack = get("STACK", "cuda12")
        if stack not in STACKS:
            raise BadSetting(f"STACK={stack!r} is not valid: one of {', '.join(STACKS)} is needed")
        default_model = DEMO_MODEL if stack == "cpu" else "meta-llama/Llama-3.1-8B-Instruct"
        length = get("MAX_MODEL_LEN", "")
        home = Path(get("HF_HOME", "~/.cache/huggingface"))
        return cls(
            stack_name=stack,
            model=get("VLLM_MODEL", get("MODEL_NAME", default_model)),
            port=number("VLLM_PORT", get("VLLM_PORT", "8000"), int, 1, 65535),
            bind=get("VLLM_BIND", "127.0.0.1"),
            max_model_len=number("MAX_MODEL_LEN", length, int, 1, 1e9) if length else None,
            tensor_parallel_size=number("TENSOR_PARALLEL_SIZE", get("TENSOR_PARALLEL_SIZE", "1"), int, 1, 1024),
            gpu_memory_utilization=number(
                "GPU_MEMORY_UTILIZATION", get("GPU_MEMORY_UTILIZATION", "0.9"), float, 0.01, 1
            ),
            dtype_bytes=DTYPE_BYTES.get(get("DTYPE", "auto"), 2),
            shm_bytes=size_in_bytes("VLLM_SHM_SIZE", get("VLLM_SHM_SIZE", "16g")),
            token=env.get("HF_TOKEN") or None,
            hub=get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"),
            hf_cache=Path(get("HF_CACHE", str(home))).expanduser(),
            image=get("VLLM_IMAGE", f"vllm-batch-invariant:{'latest' if stack == 'cuda12' else stack}"),
        )

    @classmethod
    def from_environment(cls) -> "Settings":
        return cls.read(dict(os.environ))


def size_in_bytes(name: str, text: str) -> int:
    """Docker's way to write a size: 16g, 512m, 1024k or bytes."""
    unit = {"k": 2**10, "m": 2**20, "g": 2**30}.get(text.lower().rstrip("b")[-1:], 1)
    digits = text.lower().rstrip("b").rstrip("kmg")
    if not digits.isdigit():
        raise BadSetting(f"{name}={text!r} is not valid: a size like 16g or 512m is needed")
    return int(digits) * unit
