"""A real server tells what its bits depend on, in every response; one fingerprint means one result, also on a server
with other batch sizes; plain vLLM says that it is plain."""

import asyncio
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest
import torch
from real_server import KEY, ON_GPU, VLLM, RealServer, harness, needs_server, running

starlette = pytest.importorskip("starlette.applications", reason="starlette comes with vLLM")
from starlette.middleware import Middleware  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402

from batch_invariant_ops.integrations import fingerprint as integration  # noqa: E402

PATH = "/batch_invariant/fingerprint"
HEADER = "x-batch-invariant-fingerprint"
FOUND = {"fingerprint": "bi-0123456789abcdef", "batch_invariant": True, "fields": {"torch": "2.13.0"}}


class AuthenticationMiddleware:
    """Has the name and the method of vLLM's guard."""

    def __init__(self, app, tokens):
        self.app, self.tokens = app, tokens

    def verify_token(self, headers):
        return headers.get("authorization") in self.tokens

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)


@pytest.fixture
def application(monkeypatch):
    """A function that makes an application with our middleware, as vLLM adds it, around one page."""
    monkeypatch.setattr(integration, "of_server", lambda state: FOUND)

    def make(key: str | None = None, **args):
        guard = [Middleware(AuthenticationMiddleware, tokens=[f"Bearer {key}"])] if key else []
        made = starlette.Starlette(
            routes=[Route("/page", lambda request: PlainTextResponse("page"))],
            middleware=[Middleware(integration.FingerprintMiddleware), *guard],
        )
        made.state.args = SimpleNamespace(**args)
        return made

    return make


def ask(application, method="GET", path=PATH, **more):
    async def once():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://test") as client:
            return await client.request(method, path, **more)

    return asyncio.run(once())


@pytest.mark.parametrize("path", ["/page", "/missing", PATH])
def test_every_response_has_the_header(application, path):
    assert ask(application(), path=path).headers[HEADER] == FOUND["fingerprint"]


def test_the_page_behind_is_untouched(application):
    assert ask(application(), path="/page").text == "page"


def test_the_endpoint_shows_everything(application):
    assert ask(application()).json() == FOUND


def test_the_endpoint_asks_for_the_key_where_the_server_does(application):
    locked = application(key="k")
    assert ask(locked).status_code == 401 and "torch" not in ask(locked).text
    assert ask(locked, headers={"authorization": "Bearer wrong"}).status_code == 401
    assert ask(locked, headers={"authorization": "Bearer k"}).json() == FOUND


def test_the_endpoint_is_only_read(application):
    assert ask(application(), "POST").status_code == 405
    head = ask(application(), "HEAD")
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("mode", ["hash", "custom", "none"])
def test_a_users_own_choice_for_system_fingerprint_stays(application, mode):
    chosen = application(fingerprint_mode=mode)
    chosen.state.openai_serving_chat = SimpleNamespace(system_fingerprint="theirs")
    ask(chosen)
    assert chosen.state.openai_serving_chat.system_fingerprint == "theirs"


def test_system_fingerprint_is_set_where_the_release_fills_it(application):
    old, new = application(), application(fingerprint_mode="full")
    old.state.openai_serving_chat = SimpleNamespace()
    new.state.openai_serving_chat = SimpleNamespace(system_fingerprint="vllm-0.32.0-01234567")
    ask(old)
    ask(new)
    assert new.state.openai_serving_chat.system_fingerprint == FOUND["fingerprint"]
    assert vars(old.state.openai_serving_chat) == {}


def test_a_server_whose_fingerprint_cannot_be_found_serves_and_claims_nothing(application, monkeypatch):
    def fail(state):
        raise AttributeError("no such thing in this release")

    monkeypatch.setattr(integration, "of_server", fail)
    response = ask(application(), path="/page")
    assert (response.text, response.headers[HEADER]) == ("page", "unknown")
    assert ask(application()).json()["batch_invariant"] is False


def test_the_status_of_another_mode_claims_nothing(monkeypatch, tmp_path):
    """A file that says ok is not enough: the switch must be on, too, and the other way round."""
    state = SimpleNamespace(vllm_config=SimpleNamespace(model_config=SimpleNamespace(model="m", revision=None)))
    state.args = SimpleNamespace()
    for name in ("of_config", "of_model"):
        monkeypatch.setattr(integration, name, lambda config: {"weights": "w", "settings": "s"})
    monkeypatch.setattr(integration, "of_platform", dict)
    status = tmp_path / "status.json"
    monkeypatch.setenv("BATCH_INVARIANT_STATUS_FILE", str(status))
    for switch, ok, kind in (("1", True, "bi"), ("0", True, "plain"), ("1", False, "plain"), ("1", None, "plain")):
        monkeypatch.setenv("BATCH_INVARIANT", switch)
        status.write_text(json.dumps({} if ok is None else {"ok": ok, "numerics": {"weights": "w"}}))
        assert integration.of_server(state)["fingerprint"].startswith(f"{kind}-"), (switch, ok)


# ---- a real server ----


def shown(url: str) -> dict:
    return httpx.get(url + PATH, headers={"authorization": f"Bearer {KEY}"}).raise_for_status().json()


@pytest.fixture(scope="module")
def first_run(batch_invariant_server, tmp_path_factory) -> dict:
    """What a first server said and answered."""
    url = batch_invariant_server.url
    record = tmp_path_factory.mktemp("record") / "record.jsonl"
    question = {"model": "tiny", "prompt": "the river", "max_tokens": 3}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "the river"}], "max_tokens": 3}
    with httpx.Client(base_url=url, timeout=60) as client:
        key = {"authorization": f"Bearer {KEY}"}
        found = {
            "shown": shown(url),
            "locked": client.get(PATH),
            "open": [client.get("/health"), client.get("/v1/models"), client.get("/nowhere")],
            "completion": client.post("/v1/completions", json=question, headers=key),
            "chat": client.post("/v1/chat/completions", json=chat, headers=key),
            "stream": client.post("/v1/completions", json=question | {"stream": True}, headers=key),
            "record": record,
            "recorded": harness(url, "--record", record, "--max-tokens", 24, "--concurrency", 8),
        }
    return found


@needs_server
def test_a_real_server_says_what_it_runs(first_run, small_model):
    content = first_run["shown"]
    fields = content["fields"]
    assert content["batch_invariant"] is fields["batch_invariant"] is True
    assert content["fingerprint"].startswith("bi-") and content["model"] == "tiny-llama"
    assert fields["vllm"].split("+")[0] == importlib.metadata.version(VLLM).split("+")[0]
    assert fields["torch"] == torch.__version__
    attention = "FLASH_ATTN" if ON_GPU else "CPU_ATTN"
    assert (fields["dtype"], fields["attention_backend"], fields["tensor_parallel_size"]) == ("bfloat16", attention, 1)
    assert (ON_GPU or fields["threads"] >= 1) and fields["quantization"] is None and fields["unproven"] is None
    files = sorted(small_model.glob("*.safetensors"))
    lines = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    assert fields["weights"] == hashlib.sha256(lines.encode()).hexdigest()


@needs_server
def test_blocks_of_attention_that_were_asked_for_are_part_of_it():
    from vllm.config import AttentionConfig

    settings = integration._attention_settings
    assert settings(AttentionConfig()) is None
    assert settings(AttentionConfig(backend="FLEX_ATTENTION")) is None, "a field of its own says that"
    assert settings(AttentionConfig(flex_attn_block_n=64, backend="FLEX_ATTENTION")) == '{"flex_attn_block_n": 64}'
    assert json.loads(settings(AttentionConfig(flash_attn_version=2))) == {"flash_attn_version": 2}


@needs_server
def test_nothing_of_the_machine_or_the_key_is_shown(first_run, small_model):
    text = json.dumps(first_run["shown"])
    assert KEY not in text and str(small_model.parent) not in text


@needs_server
def test_the_full_fingerprint_is_behind_the_key_and_the_digest_is_in_front(first_run):
    digest = first_run["shown"]["fingerprint"]
    assert first_run["locked"].status_code == 401 and "torch" not in first_run["locked"].text
    responses = [
        first_run["locked"],
        *first_run["open"],
        *(first_run[name] for name in ("completion", "chat", "stream")),
    ]
    assert [response.status_code for response in responses] == [401, 200, 401, 404, 200, 200, 200]
    assert {response.headers[HEADER] for response in responses} == {digest}


@needs_server
def test_the_answers_bear_it_as_their_system_fingerprint(first_run):
    digest = first_run["shown"]["fingerprint"]
    assert first_run["completion"].json()["system_fingerprint"] == digest
    assert first_run["chat"].json()["system_fingerprint"] == digest
    events = [line[6:] for line in first_run["stream"].text.splitlines() if line.startswith("data: {")]
    assert json.loads(events[-1])["system_fingerprint"] == digest


@pytest.fixture(scope="module")
def other_batches(small_model, tmp_path_factory) -> Iterator[RealServer]:
    """A server that batches otherwise, and whose KV cache holds hardly more than one request of the largest length."""
    batches = "--max-num-batched-tokens 256 --max-num-seqs 24 --no-enable-prefix-caching"
    cache = f"--num-gpu-blocks-override {2176 // (16 if ON_GPU else 128)}"  # by the tokens of a block
    with running(
        RealServer("second", small_model, tmp_path_factory.mktemp("logs"), True, f"{batches} {cache}")
    ) as server:
        yield server


@needs_server
def test_one_fingerprint_gives_one_result_on_a_server_with_other_batch_sizes(first_run, other_batches):
    assert first_run["recorded"].returncode == 0, first_run["recorded"].stderr
    assert shown(other_batches.url) == first_run["shown"]
    for count in (1, 16):
        done = harness(other_batches.url, "--verify", first_run["record"], "--concurrency", count)
        assert done.returncode == 0 and "all 8 answers equal the record, in logprobs" in done.stdout, done.stdout


@needs_server
def test_requests_that_lose_their_cache_and_are_computed_anew_have_one_answer(other_batches):
    load = ("--mode", "mixed", "--requests", 64, "--concurrency", 24, "--max-tokens", 64, "--background", 0)
    done = harness(other_batches.url, *load)
    assert done.returncode == 0 and "64 of 64" in done.stdout, done.stdout
    metrics = httpx.get(other_batches.url + "/metrics").text
    assert sum(map(float, re.findall(r"^vllm:num_preemptions_total\S* (\S+)$", metrics, re.MULTILINE))) > 0


@needs_server
def test_plain_vllm_says_that_it_is_plain_and_is_told_apart(first_run, plain_server):
    url = plain_server.url
    content = shown(url)
    answer = httpx.post(
        url + "/v1/completions",
        json={"model": "tiny", "prompt": "the river", "max_tokens": 3},
        headers={"authorization": f"Bearer {KEY}"},
        timeout=60,
    )
    done = harness(url, "--verify", first_run["record"], "--concurrency", 1)
    assert content["batch_invariant"] is False
    assert content["fingerprint"].startswith("plain-") and content["fields"]["weights"] is not None
    assert answer.json()["system_fingerprint"] == answer.headers[HEADER] == content["fingerprint"]
    assert "batch_invariant:        True → False" in done.stdout, done.stdout
    assert done.returncode == 1, "recorded 8 at a time and verified one by one, plain vLLM must differ"
