"""The fingerprint of a vLLM server, told in each of its responses: an ASGI middleware for ``vllm serve --middleware``.

Nothing of vLLM is replaced. The API server's own state holds the configuration; what only a worker knows comes through
the status file. A digest goes into the header ``x-batch-invariant-fingerprint`` of every response, and into
``system_fingerprint`` where the release fills that field (from 0.21 on) and ``--fingerprint-mode`` is not given.
``GET /batch_invariant/fingerprint`` gives all fields; it asks for the API key where ``/v1`` does, as versions and the
kind of device are nobody else's business.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from batch_invariant_ops import fingerprint, model_files, status
from batch_invariant_ops.fingerprint import Fields

PATH = "/batch_invariant/fingerprint"
HEADER = b"x-batch-invariant-fingerprint"
SERVING = ("openai_serving_completion", "openai_serving_chat", "openai_serving_chat_batch")
SLOW = 5.0  # seconds after which reading the model is worth a line in the log

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
logger = logging.getLogger(__name__)


def of_config(config: Any) -> Fields:
    """What the bits depend on of a ``VllmConfig``; the same names in every supported release."""
    from vllm.version import __version__ as release

    from batch_invariant_ops.integrations import unproven

    model, cache, parallel, compilation = (
        config.model_config,
        config.cache_config,
        config.parallel_config,
        config.compilation_config,
    )
    mode = getattr(compilation.mode, "name", None)
    speculative = config.speculative_config
    return {
        "vllm": release,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "kv_cache_dtype": str(cache.cache_dtype),
        "block_size": cache.block_size,
        "max_model_len": model.max_model_len,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "expert_parallel": bool(parallel.enable_expert_parallel),
        "compilation": f"{mode} {compilation.backend} {' '.join(compilation.custom_ops)}".strip(),
        "fusions": fingerprint.names(name for name, on in vars(compilation.pass_config).items() if on is True),
        "attention_backend": getattr(config.attention_config.backend, "name", "auto"),
        "attention_settings": _attention_settings(config.attention_config),
        "speculative_decoding": None if speculative is None else str(speculative.method),
        "lora": config.lora_config is not None,
        "logprobs": str(model.logprobs_mode),
        "sampling_defaults": json.dumps(model.get_diff_sampling_param(), sort_keys=True, default=str),
        "overrides": fingerprint.of_text(model.hf_overrides) if model.hf_overrides else None,
        "unproven": ", ".join(unproven.unproven(config)) or None,
    }


def _attention_settings(attention: Any) -> str | None:
    """What of it was asked for beside a backend, such as another version or other blocks, which add in other steps."""
    default, names = type(attention)(), {field.name for field in dataclasses.fields(attention)} - {"backend"}
    asked = {name: getattr(attention, name) for name in names if getattr(attention, name) != getattr(default, name)}
    return json.dumps(asked, sort_keys=True, default=str) if asked else None


def of_worker(config: Any, device: Any, model: Any) -> Fields:
    """What a worker knows once it has loaded the model: the configuration as it ended up, and the device.

    Nothing where it cannot be found: the server's fingerprint then holds what its other process knows.
    """
    from batch_invariant_ops.integrations import unproven

    try:
        backends = fingerprint.names(backend for _, backend in unproven.attention_layers(model))
        known = of_config(config) | fingerprint.device(device)
        return known | ({"attention_backend": backends} if backends else {})
    except Exception as error:
        logger.warning("the fingerprint lacks what the worker knows: %s", error or type(error).__name__)
        return {}


def of_platform() -> Fields:
    """The device as the process sees it that does not compute on it: for plain vLLM, whose workers tell nothing."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        import torch

        return fingerprint.device(torch.device("cpu")) | {"threads": None}
    capability = current_platform.get_device_capability()
    return {
        "device": current_platform.get_device_name(),
        "compute_capability": None if capability is None else capability.as_version_str(),
    }


def of_model(config: Any) -> Fields:
    """The hashes of the model's files; None for what is not there as a file."""
    model = config.model_config
    if str(config.load_config.load_format) == "dummy":
        weights: str | None = "dummy"
    else:
        weights = _known(lambda: model_files.weights(_local(model.model, model.revision, config.load_config)))
    places = {(model.model, model.revision), (model.tokenizer, model.tokenizer_revision)}
    settings = _known(lambda: model_files.settings(sorted(_folder(_local(*place)) for place in places)))
    return {"weights": weights, "settings": settings}


def _known(find: Callable[[], str | None]) -> str | None:
    try:
        return find()
    except Exception as error:
        logger.warning("the fingerprint lacks the model's files: %s", error or type(error).__name__)
        return None


def _local(name: str, revision: str | None, load_config: Any = None) -> Path:
    """The folder or file of that name, or where the hub's files of it are kept; nothing is downloaded."""
    if os.path.exists(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    folder = load_config.download_dir if load_config is not None else None
    return Path(snapshot_download(name, revision=revision, cache_dir=folder, local_files_only=True))


def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path


def of_server(state: Any) -> dict[str, Any]:
    """What the endpoint shows, from the state of vLLM's application: the digest, its fields, the model's name."""
    config = state.vllm_config
    worker = status.read()
    checked = os.environ.get("BATCH_INVARIANT") == "1" and worker.get("ok") is True
    fields = fingerprint.libraries() | {"batch_invariant": checked}
    fields |= (checked and worker.get("numerics")) or of_config(config) | of_platform()
    fields |= fingerprint.environment() | of_model(config)
    template = getattr(state.args, "chat_template", None)
    fields["chat_template"] = None if template is None else fingerprint.of_text(_content(template))
    return {
        "fingerprint": fingerprint.digest(fields),
        "batch_invariant": checked,
        "model": _name(config.model_config.model),
        "revision": config.model_config.revision,
        "fields": dict(sorted(fields.items())),
    }


def _name(model: str) -> str:
    """A hub id as it is; of a folder its name alone, as the rest of its path tells only about the machine."""
    return Path(model).name if os.path.exists(model) else model


def _content(template: Any) -> str:
    name = str(template)
    return Path(name).read_text(encoding="utf-8") if os.path.isfile(name) else name


class FingerprintMiddleware:
    """Adds the header to every response and answers at ``PATH``; everything else is vLLM's."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.found: dict[str, Any] | None = None

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        if scope["type"] not in ("lifespan", "http"):
            return await self.app(scope, receive, send)
        if self.found is None:
            self.found = await asyncio.to_thread(self._find, scope["app"])
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        value = self.found["fingerprint"].encode()

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (HEADER, value)]
            await send(message)

        if scope["path"].removeprefix(scope.get("root_path", "")) == PATH:
            return await self._answer(scope, send_with_header)
        await self.app(scope, receive, send_with_header)

    def _find(self, app: Any) -> dict[str, Any]:
        """The fingerprint, stamped on what vLLM answers with; a server serves without one if it cannot be found."""
        started = time.perf_counter()
        try:
            found = of_server(app.state)
        except Exception as error:
            logger.error("no fingerprint: %s", error or type(error).__name__, exc_info=True)
            return {"fingerprint": "unknown", "batch_invariant": False, "fields": {}}
        if getattr(app.state.args, "fingerprint_mode", "full") == "full":
            for serving in filter(None, (getattr(app.state, name, None) for name in SERVING)):
                if getattr(serving, "system_fingerprint", None) is not None:
                    serving.system_fingerprint = found["fingerprint"]
        seconds = time.perf_counter() - started
        took = f", found in {seconds:.0f} s" if seconds > SLOW else ""
        logger.info("fingerprint %s%s", found["fingerprint"], took)
        return found

    async def _answer(self, scope: Message, send: Send) -> None:
        if not allowed(scope):
            code, content = 401, {"error": "Unauthorized"}
        elif scope["method"] not in ("GET", "HEAD"):
            code, content = 405, {"error": "Method Not Allowed"}
        else:
            code, content = 200, self.found or {}
        body = json.dumps(content, indent=1).encode() + b"\n"
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": code, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def allowed(scope: Message) -> bool:
    """Whether vLLM's own guard of ``/v1`` lets this request through; True where the server asks for no key."""
    from starlette.datastructures import Headers

    for middleware in scope["app"].user_middleware:
        if getattr(middleware.cls, "__name__", "") == "AuthenticationMiddleware":
            return bool(middleware.cls(None, **middleware.kwargs).verify_token(Headers(scope=scope)))
    return True
