"""A host made of scripts on a PATH of its own, and a web server that answers as told: what the doctor is tested on."""

import contextlib
import http.server
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

DOCTOR = Path(__file__).resolve().parents[2] / "vllm" / "doctor.py"
LLAMA = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
LLAMA |= {"max_position_embeddings": 131072}
ENGINE = """
case "$*" in
  *Client.Version*) echo 24.0.7 ;;
  *Server.Version*) echo 24.0.7 ;;
  "buildx version") echo github.com/docker/buildx v0.12.0 ;;
  "compose version --short") echo 2.24.1 ;;
  *Runtimes*) echo '{"nvidia":{"path":"nvidia-container-runtime"},"runc":{"path":"runc"}}' ;;
  *DockerRootDir*) echo ROOT ;;
  "image inspect"*) echo sha256:1 ;;
  *) exit 1 ;;
esac
"""


def smi(driver="580.65.06", total=81559, free=81000, capability="9.0", count=1):
    return f"echo 'NVIDIA H100 80GB HBM3, {driver}, {total}, {free}, {capability}'\n" * count


class Host:
    """A machine made of scripts: healthy until a test replaces one."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.cache = folder / "hf"
        self.env = {"HOME": str(folder), "HF_CACHE": str(self.cache), "PATH": str(self.bin), "VLLM_PORT": free_port()}
        self.env |= {
            "VLLM_MODEL": str(self.add_model(folder / "model")),
            "MAX_MODEL_LEN": "8192",
            "VLLM_SHM_SIZE": "1g",
        }
        self.tool("docker", ENGINE.replace("ROOT", str(folder)))
        self.tool("nvidia-smi", smi())

    def tool(self, name: str, script: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def without(self, name: str) -> None:
        (self.bin / name).unlink()

    @staticmethod
    def add_model(folder: Path, weight_bytes: int = 1024) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(LLAMA))
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(weight_bytes)
        return folder

    def examine(self, **env: str) -> "Report":
        done = subprocess.run(
            [sys.executable, DOCTOR, "--json"], env=self.env | env, capture_output=True, text=True, timeout=60
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Report(done.returncode, {f["subject"]: f for f in json.loads(done.stdout or "[]")}, done.stderr)


class Report:
    def __init__(self, status: int, findings: dict[str, dict[str, str]], stderr: str) -> None:
        self.status, self.findings, self.stderr = status, findings, stderr

    def __getitem__(self, subject: str) -> tuple[str, str, str]:
        finding = self.findings[subject]
        return finding["level"], finding["detail"], finding["mend"]

    def only_problem(self, subject: str, level: str = "failure") -> tuple[str, str]:
        """The planted problem is reported at its level, everything else is well, and the exit status agrees."""
        others = {s: f for s, f in self.findings.items() if s != subject and f["level"] != "ok"}
        assert not others
        assert self[subject][0] == level
        assert self.status == (1 if level == "failure" else 0)
        assert self[subject][2], "a problem without a way to mend it"
        return self[subject][1:]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextlib.contextmanager
def serving(answers):
    """A web server on a free port; `answers` maps a path and a token to a status and an object."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, content = answers(self.path, self.headers.get("Authorization"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
