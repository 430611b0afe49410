"""The model: where it is, whether the hub gives it to this user, how large it is, what a token of context costs."""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from diagnosis.finding import Finding, failure, gib, ok, warning
from diagnosis.settings import DEMO_MODEL, Settings

SECONDS = 15


@dataclass(frozen=True)
class Model:
    """What could be learned of a model. `weight_bytes` is None where it could not, and `why_unknown` says why."""

    weight_bytes: int | None = None
    config: dict = field(default_factory=dict)
    is_on_disk: bool = False
    why_unknown: str = ""

    @property
    def text_config(self) -> dict:
        return self.config.get("text_config", self.config)

    @property
    def max_positions(self) -> int | None:
        return self.text_config.get("max_position_embeddings")

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Keys and values of every layer: 2 · layers · kv_heads · head_size · dtype_bytes; 0 where unknown."""
        config = self.text_config
        layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
        if not layers or not heads or not config.get("hidden_size"):
            return 0
        head_size = config.get("head_dim") or config["hidden_size"] // heads
        return 2 * layers * (config.get("num_key_value_heads") or heads) * head_size * dtype_bytes


def find_model(settings: Settings) -> tuple[Model, list[Finding]]:
    """Look for the model in a folder, in the cache, then at the hub."""
    if settings.model == DEMO_MODEL:
        return Model(0, {}, True), [ok("Model", "the small random model, made in the container at its first start")]
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        return from_folder(folder)
    if settings.model.startswith(("/", ".", "~")):
        return Model(why_unknown="there is no such folder"), [
            failure("Model", f"there is no folder {settings.model}", "VLLM_MODEL=a folder that is there, or a hub id")
        ]
    cached = newest_snapshot(settings)
    if cached:
        model, findings = from_folder(cached)
        return model, [ok("Model", f"{settings.model} is in {settings.hf_cache}")] if model.is_on_disk else findings
    return from_hub(settings)


def newest_snapshot(settings: Settings) -> Path | None:
    """The folder of a complete download in the Hugging Face cache."""
    snapshots = settings.hf_cache / "hub" / f"models--{settings.model.replace('/', '--')}" / "snapshots"
    complete = [path.parent for path in snapshots.glob("*/config.json") if list(path.parent.glob("*.safetensors"))]
    return max(complete, key=lambda path: path.stat().st_mtime, default=None)


def from_folder(folder: Path) -> tuple[Model, list[Finding]]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        finding = failure("Model", f"{folder} holds no config.json", "VLLM_MODEL=a folder with a Hugging Face model")
        return Model(why_unknown="no config.json"), [finding]
    except (OSError, ValueError) as error:
        finding = failure("Model", f"{folder}/config.json cannot be read: {error}", "fetch the model again")
        return Model(why_unknown="config.json cannot be read"), [finding]
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not weights:
        finding = failure("Model", f"{folder} holds no *.safetensors", "fetch the model's weights")
        return Model(None, config, False, "there are no weights"), [finding]
    return Model(weights, config, True), [ok("Model", f"{folder}, {gib(weights)} of weights")]


def from_hub(settings: Settings) -> tuple[Model, list[Finding]]:
    """Ask the hub for the files' sizes, then for config.json, which a gated model gives only to those it let in."""
    token_line = [] if settings.token is None else [ok("HF token", "set")]
    try:
        listing = fetch(settings, f"/api/models/{settings.model}?blobs=true")
        files = {entry["rfilename"]: entry.get("size") or 0 for entry in listing.get("siblings", [])}
        weights = sum(size for name, size in files.items() if name.endswith(".safetensors") and "/" not in name)
        model = Model(weights or None, {}, False, "" if weights else "the hub lists no safetensors files")
    except urllib.error.HTTPError as error:
        return Model(why_unknown=f"the hub answered {error.code}"), [refused(settings, error.code)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "reason", error)
        finding = warning(
            "Model",
            f"{settings.hub} could not be asked about {settings.model}: {reason}",
            "check the network or HTTPS_PROXY; without it, VLLM_MODEL=a folder",
        )
        return Model(why_unknown="the hub could not be asked"), [finding, *token_line]
    try:
        config = fetch(settings, f"/{settings.model}/resolve/main/config.json")
    except urllib.error.HTTPError as error:
        return model, [refused(settings, error.code)]
    except (OSError, ValueError):
        config = {}
    access = "gated, and this token is let in" if listing.get("gated") else "open to all"
    size = gib(model.weight_bytes) if model.weight_bytes else "unknown size"
    return Model(model.weight_bytes, config, False, model.why_unknown), [
        ok("Model", f"{settings.model} at the hub, {size}, {access}"),
        *token_line,
    ]


def fetch(settings: Settings, path: str) -> dict:
    headers = {"User-Agent": "vllm-doctor"}
    if settings.token:
        headers["Authorization"] = f"Bearer {settings.token}"
    with urllib.request.urlopen(
        urllib.request.Request(settings.hub + path, headers=headers), timeout=SECONDS
    ) as answer:
        content = json.load(answer)
    if not isinstance(content, dict):
        raise ValueError("the answer is no JSON object")
    return content


def refused(settings: Settings, code: int) -> Finding:
    """What a refusal by the hub means, with and without a token."""
    page = f"{settings.hub}/{settings.model}"
    if code == 401 and settings.token:
        return failure("HF token", "the hub does not accept it", f"make a new one at {settings.hub}/settings/tokens")
    if code == 403 and settings.token:
        return failure("HF token", f"it gives no access to {settings.model}", f"ask for access at {page}")
    if code in (401, 403):
        return failure(
            "HF token",
            f"{settings.model} is gated or does not exist, and HF_TOKEN is not set",
            f"ask for access at {page}, then export HF_TOKEN=...",
        )
    if code == 404:
        return failure("Model", f"the hub has no {settings.model}", "VLLM_MODEL=the id as the model's page shows it")
    return warning("Model", f"the hub answered {code} for {settings.model}", "try again later")
