"""The kit as a user has it: a copy of the checkout with a .env in it, driven through make against a real engine.

Container, volumes, port and Compose project carry names of the test's own, so a server that runs on the same machine
is left alone.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from threading import Event

ROOT = Path(__file__).resolve().parents[2]
NAME = "vllm-kit-test"
IMAGE = f"{NAME}:cpu"
TOKEN = "hf_canaryOfTheDeploymentTests"
KEY = "key-canary-of-the-deployment-tests"
MODEL = "demo"


def docker(*arguments: str, check: bool = True, timeout: float = 300, stdin: str = "") -> str:
    """Run docker; its output, standard error after standard output."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout, input=stdin)
    assert not check or done.returncode == 0, f"docker {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return (done.stdout + done.stderr).strip()


def inspect(name: str, template: str) -> str:
    return docker("inspect", "--format", template, name, check=False)


def wait_until(condition: Callable[[], bool], what: str, seconds: int = 300) -> None:
    """Poll a condition; fail with its name once it has had its time."""
    pause = Event()
    for _ in range(seconds * 2):
        if condition():
            return
        pause.wait(0.5)
    raise AssertionError(f"not within {seconds} s: {what}")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Kit:
    """One checkout, one port. `env` is what a user's shell would have set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        files = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in filter(None, subprocess.check_output(files, text=True).split("\0")):
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.folder / name)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        settings = {"VLLM_PORT": self.port, "HF_TOKEN": TOKEN, "VLLM_API_KEY": KEY, "VLLM_IMAGE": IMAGE}
        (self.folder / "vllm" / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        self.env = {name: value for name, value in os.environ.items() if name.startswith(("DOCKER_", "PATH"))}
        self.env |= {"HOME": str(folder), "COMPOSE_PROJECT_NAME": NAME, "VLLM_CONTAINER": NAME, "STACK": "cpu"}

    def make(self, *arguments: str, check: bool = True, timeout: float = 900, stdin: str = "", **env: str) -> str:
        """Run make; its output, both streams in order."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            input=stdin,
        )
        self.status = done.returncode
        assert not check or done.returncode == 0, f"make {' '.join(arguments)}:\n{done.stdout[-4000:]}"
        return done.stdout

    @staticmethod
    def command(*arguments: str) -> list[str]:
        # The targets call whichever Python a user has; here, the one with the tests' packages.
        return ["make", "--no-print-directory", f"vllm_python={sys.executable}", *arguments]

    def start_in_foreground(self, target: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(target),
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait_ready(self) -> None:
        command = [sys.executable, self.folder / "vllm" / "wait_ready.py", "--url", self.url, "--container", NAME]
        done = subprocess.run([*command, "--seconds", "900"], env=self.env, capture_output=True, text=True, timeout=950)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr

    def request(self, path: str, body: dict | None = None, key: str | None = KEY) -> tuple[int, str]:
        """One request; status and body, also of a refusal."""
        try:
            with self.open(path, body, key) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def open(self, path: str, body: dict | None, key: str | None = KEY):
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        content = None if body is None else json.dumps(body).encode()
        return urllib.request.urlopen(urllib.request.Request(self.url + path, content, headers), timeout=120)

    def last_event(self, path: str, body: dict, begun: Callable[[], None]) -> str:
        """Read a stream to its end, telling when its first event is there; its last event."""
        last = ""
        with self.open(path, body | {"stream": True}) as answer:
            for line in filter(None, map(bytes.strip, answer)):
                begun()
                last = line.decode().removeprefix("data: ")
        return last

    def bits(self) -> str:
        """A completion with its logprobs, as the server printed them: equal strings are equal bits."""
        asked = {"model": MODEL, "prompt": "The same prompt", "max_tokens": 24, "temperature": 0, "logprobs": 5}
        status, body = self.request("/v1/completions", asked)
        assert status == 200, body
        choice = json.loads(body)["choices"][0]
        return json.dumps([choice["text"], choice["logprobs"]])

    def compiled(self) -> list[str]:
        """What torch.compile has made in the compile cache: each library with the time when it was written."""
        find = ("find", "/var/cache/batch-invariant", "-name", "*.so", "-printf", "%p %T@\\n")
        return sorted(docker("exec", NAME, *find).splitlines())

    def start_seconds(self) -> list[float]:
        """How long each start of the container took, from the first word of serve.py until the server was ready."""
        seconds, begun = [], None
        for line in sorted(docker("logs", "--timestamps", NAME).splitlines()):
            time, _, words = line.partition(" ")
            if words.startswith("vLLM  "):
                begun = datetime.fromisoformat(time[:26])
            elif "Application startup complete" in words and begun:
                seconds.append((datetime.fromisoformat(time[:26]) - begun).total_seconds())
        return seconds

    def log(self) -> str:
        return docker("logs", NAME)

    def processes(self) -> dict[str, int]:
        """The container's processes by title, with the host's process ids."""
        lines = docker("top", NAME, "-o", "pid,args").splitlines()[1:]
        return {title: int(pid) for pid, title in (line.split(None, 1) for line in lines)}

    def clean(self) -> None:
        self.make("vllm-compose-down", check=False)
        docker("rm", "--force", NAME, check=False)
        volumes = docker("volume", "ls", "--quiet", "--filter", f"name={NAME}").split()
        if volumes:
            docker("volume", "rm", "--force", *volumes, check=False)
