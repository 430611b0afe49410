"""A start that cannot work says so in one line, ends with a failure, and is not tried again at full speed."""

import json

import pytest
from kit import IMAGE, NAME, docker, inspect, wait_until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]
DEMO = ("-e", "MODEL_NAME=demo")


@pytest.fixture
def start(nothing_running):
    """Run the image with docker's own options; its exit status and what it logged."""

    def run(*options: str) -> tuple[int, list[str]]:
        docker("run", "--name", NAME, "--shm-size", "1g", *options, IMAGE, check=False)
        status, log = int(inspect(NAME, "{{.State.ExitCode}}")), docker("logs", NAME).splitlines()
        docker("rm", NAME)
        return status, log

    return run


@pytest.mark.parametrize(
    "options, words",
    [
        (("-e", "MODEL_NAME=/models/none"), "MODEL_NAME='/models/none' is not valid: there is no such folder"),
        (("-e", "MODEL_NAME=org/none", "--network", "none"), "MODEL_NAME='org/none' is not in the cache"),
        (("-e", "BATCH_INVARIANT_STACK=cuda12 vllm==0.19.1"), "no NVIDIA GPU is in this container"),
        ((*DEMO, "--shm-size", "64m"), "/dev/shm has 64 MiB and 192 MiB are needed"),
        ((*DEMO, "-e", "MAX_MODEL_LEN=abc"), "MAX_MODEL_LEN='abc' is not valid"),
        ((*DEMO, "-e", "VLLM_ATTENTION_BACKEND=FAST"), "VLLM_ATTENTION_BACKEND='FAST' is not valid"),
        ((*DEMO, "-e", "DRAIN_SECONDS=soon"), "DRAIN_SECONDS='soon' is not valid"),
        ((*DEMO, "-e", "VLLM_BIND=0.0.0.0"), "VLLM_API_KEY"),
        ((*DEMO, "--read-only"), "/var/cache/batch-invariant (compile cache) cannot be written"),
        ((*DEMO, "--user", "1234:1234", "-v", "FOLDER:/var/cache/batch-invariant"), "that user 1234 can write"),
        ((*DEMO, "--tmpfs", "/var/cache/batch-invariant:size=1m,mode=1777"), "MiB are needed"),
        (("-e", "MODEL_NAME=org/none", "--tmpfs", "/root/.cache/huggingface:size=1m"), "Hugging Face cache"),
    ],
    ids=[
        "folder",
        "hub",
        "gpu",
        "shm",
        "length",
        "backend",
        "drain",
        "open",
        "read-only",
        "user",
        "full",
        "full-hf-cache",
    ],
)
def test_it_is_said_in_one_line(start, tmp_path, options, words):
    status, log = start(*(option.replace("FOLDER", str(tmp_path)) for option in options))
    said = [line for line in log if words in line]
    assert status == 2 and len(said) == 1, log
    assert log[-1] == said[0] and not any("Traceback" in line for line in log)


def test_docker_waits_longer_before_each_new_try(nothing_running):
    docker("run", "--detach", "--name", NAME, "--restart", "unless-stopped", "-e", "DRAIN_SECONDS=x", IMAGE)
    wait_until(lambda: int(inspect(NAME, "{{.RestartCount}}")) >= 7, "seven restarts")
    docker("stop", NAME)
    begin, end = (inspect(NAME, f"{{{{.{when}}}}}") for when in ("Created", "State.FinishedAt"))
    form = ("--filter", f"container={NAME}", "--format", "{{json .}}")
    events = [json.loads(line) for line in docker("events", "--since", begin, "--until", end, *form).splitlines()]
    times = [event["timeNano"] for event in events if event["status"] in ("die", "start")]
    pauses = [start - die for die, start in zip(times[1::2], times[2::2], strict=False)]
    # Docker's own wait is 0.1 s, then twice the one before: 3.2 s before the sixth. The container's start is in each
    # pause, too, most of a second on a busy machine.
    assert len(pauses) >= 6 and pauses[5] > 1.6e9, pauses
