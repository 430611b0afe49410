"""The GPU: driver, container toolkit, compute capability, and memory against the model and its context."""

from dataclasses import dataclass

from diagnosis.finding import Finding, ask, failure, gib, ok, version_in, warning
from diagnosis.model import Model
from diagnosis.settings import Settings

TOOLKIT_GUIDE = "https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/install-guide.html"
PROVEN = {(9, 0)}
OLDEST = (8, 0)
QUERY = "name,driver_version,memory.total,memory.free,compute_cap"
# CUDA's context, CUDA graphs and the activations of one prefill chunk, as vLLM's profiling run finds them.
ACTIVATION_BYTES = 3 * 2**30


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi; memory in bytes."""

    name: str
    driver: tuple[int, ...]
    total: int
    free: int
    capability: tuple[int, ...]

    @classmethod
    def parse(cls, line: str) -> "Gpu":
        name, driver, total, free, capability = (part.strip() for part in line.split(","))
        return cls(name, version_in(driver), int(total) * 2**20, int(free) * 2**20, version_in(capability))


def check_gpus(settings: Settings, model: Model) -> list[Finding]:
    """Everything that needs a GPU; on the cpu stack, a line that says that none is needed."""
    if settings.stack.min_driver is None:
        return [ok("GPU", "none is needed by the cpu stack")]
    answer = ask("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits")
    if answer.status == 127:
        return [
            failure(
                "GPU",
                "nvidia-smi is not installed: no NVIDIA driver was found",
                "install the driver: sudo apt-get install nvidia-driver-580-server; or try STACK=cpu, which needs none",
            )
        ]
    if answer.status != 0:
        mend = "sudo reboot" if "mismatch" in answer.text.lower() else "sudo dmesg | grep -i nvrm"
        return [failure("GPU", f"nvidia-smi fails: {answer.last_line}", mend)]
    try:
        gpus = [Gpu.parse(line) for line in answer.text.splitlines() if line.strip()]
    except ValueError:
        return [failure("GPU", f"nvidia-smi's answer was not understood: {answer.last_line}", "update the driver")]
    if not gpus:
        return [failure("GPU", "nvidia-smi lists no GPU", "sudo dmesg | grep -i nvrm")]
    return [
        check_driver(settings, gpus[0]),
        check_toolkit(),
        check_count(settings, gpus),
        check_capability(gpus[: settings.tensor_parallel_size]),
        *check_memory(settings, model, gpus[: settings.tensor_parallel_size]),
    ]


def check_driver(settings: Settings, gpu: Gpu) -> Finding:
    found = ".".join(map(str, gpu.driver))
    needed = settings.stack.min_driver or 0
    if gpu.driver >= (needed,):
        return ok("Driver", f"{found} ({needed} or newer is needed by the {settings.stack_name} stack)")
    other = "STACK=cuda12, or " if gpu.driver >= (525,) else ""
    return failure(
        "Driver",
        f"{found} is too old for the {settings.stack_name} stack: {needed} or newer is needed",
        f"{other}sudo apt-get install nvidia-driver-580-server, then reboot",
    )


def check_toolkit() -> Finding:
    """Docker can hand a GPU to a container."""
    runtimes = ask("docker", "info", "--format", "{{json .Runtimes}} {{json .CDISpecDirs}}")
    if runtimes.status != 0:  # an engine that knows nothing of CDI refuses the whole template
        runtimes = ask("docker", "info", "--format", "{{json .Runtimes}}")
    if runtimes.status == 0 and "nvidia" in runtimes.text:
        return ok("Container toolkit", "Docker knows the nvidia runtime")
    configure = "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
    if ask("nvidia-ctk", "--version").status == 0:
        return failure("Container toolkit", "installed, but Docker does not know its runtime", configure)
    if ask("nvidia-container-cli", "--version").status == 0:
        return warning("Container toolkit", "only its older part is installed", f"update it: {TOOLKIT_GUIDE}")
    return failure("Container toolkit", "not installed", f"{TOOLKIT_GUIDE}, then {configure}")


def check_count(settings: Settings, gpus: list[Gpu]) -> Finding:
    names = ", ".join(sorted({gpu.name for gpu in gpus}))
    if len(gpus) < settings.tensor_parallel_size:
        return failure(
            "GPUs",
            f"{len(gpus)} ({names}), and TENSOR_PARALLEL_SIZE={settings.tensor_parallel_size} asks for more",
            f"TENSOR_PARALLEL_SIZE={len(gpus)}",
        )
    return ok("GPUs", f"{len(gpus)} ({names}), {settings.tensor_parallel_size} used")


def check_capability(gpus: list[Gpu]) -> Finding:
    lowest = min(gpu.capability for gpu in gpus)
    text = ".".join(map(str, lowest))
    if lowest < OLDEST:
        return failure(
            "Compute capability",
            f"{text}: bf16 tensor cores and FlashAttention begin at 8.0",
            "use a GPU of the Ampere generation or newer",
        )
    if any(gpu.capability not in PROVEN for gpu in gpus):
        return warning(
            "Compute capability",
            f"{text}: not measured by this project; what no proof covers runs on the kit's own kernel, slower",
            "make vllm-test proves the running server",
        )
    return ok("Compute capability", text)


def check_memory(settings: Settings, model: Model, gpus: list[Gpu]) -> list[Finding]:
    """Weights, one request of full length and the activations fit into the share of memory that vLLM takes."""
    if model.weight_bytes is None:
        return [warning("GPU memory", f"not compared: {model.why_unknown}", "look at the model's size on its page")]
    budget = min(gpu.total for gpu in gpus) * settings.gpu_memory_utilization
    weights = model.weight_bytes / len(gpus)
    length = settings.max_model_len or model.max_positions
    cache = model.kv_bytes_per_token(settings.dtype_bytes) * (length or 0) / len(gpus)
    needed = weights + cache + ACTIVATION_BYTES
    detail = (
        f"{gib(needed)} of {gib(budget)} a GPU: weights {gib(weights)}, "
        f"one request of {length or 'unknown'} tokens {gib(cache)}, activations {gib(ACTIVATION_BYTES)}"
    )
    findings = []
    if weights + ACTIVATION_BYTES > budget:
        mend = f"VLLM_MODEL=... of half the size, or TENSOR_PARALLEL_SIZE={len(gpus) * 2}"
        findings.append(failure("GPU memory", detail, mend))
    elif needed > budget:
        room = budget - weights - ACTIVATION_BYTES
        fitting = int(room * len(gpus) / model.kv_bytes_per_token(settings.dtype_bytes)) // 1024 * 1024
        findings.append(failure("GPU memory", detail, f"MAX_MODEL_LEN={max(fitting, 1024)}"))
    else:
        findings.append(ok("GPU memory", detail))
    free = min(gpu.free for gpu in gpus)
    if free < budget:
        findings.append(
            warning(
                "GPU memory in use",
                f"{gib(free)} free, vLLM takes {gib(budget)}: other programs are on the GPU",
                f"stop them (nvidia-smi lists them), or GPU_MEMORY_UTILIZATION={free / max(g.total for g in gpus):.2f}",
            )
        )
    return findings
