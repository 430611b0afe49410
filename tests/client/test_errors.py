"""Whatever goes wrong is one line that says what to do, never a traceback, and no part of an answer passes for one."""

import asyncio
import json
import runpy
import signal
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest
from client_kit import CLIENT, NamesItsModels, environment, event, only_line, streaming
from fake_server import Behaviour, serving

NAMES = ["simple", "concurrent", "stream", "determinism"]


@pytest.mark.parametrize("key", [{}, {"VLLM_API_KEY": ""}, {"VLLM_API_KEY": "wrong"}], ids=["none", "empty", "wrong"])
@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_wrong_key_says_what_to_set(client, name, key):
    with serving(Behaviour(api_key="secret")) as server:
        line = only_line(client(name, "--url", server.url, "--model", "fake", **key), 2)
        assert line == "example_client: the server asks for its key (HTTP 401): set VLLM_API_KEY to it"
        assert only_line(client(name, "--url", server.url, **key), 2) == line


@pytest.mark.parametrize("name", NAMES)
def test_an_unreachable_server_is_named(client, name):
    with serving(Behaviour()) as server:
        url = server.url
    for model in ([], ["--model", "m"]):
        assert f"nothing answers at {url}" in only_line(client(name, "--url", url, *model), 2)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_model_is_refused_in_the_servers_words(client, name):
    with serving(Behaviour(), NamesItsModels) as server:
        line = only_line(client(name, "--url", server.url, "--model", "none"), 2)
        assert line == "example_client: HTTP 404: The model `none` does not exist."
        assert client(name, "--url", server.url, "--model", "fake").returncode == 0


def test_several_models_are_listed_to_choose_from(client):
    with serving(Behaviour(models=("one", "two"))) as server:
        assert "--model is needed: the server has one, two" in only_line(client("--url", server.url), 2)
        assert client("simple", "--url", server.url, "--model", "two").returncode == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "fault, status, words",
    [
        ("error_500", 1, "HTTP 500: engine died"),
        ("busy", 1, "HTTP 503: too many requests"),
        ("limited", 2, "HTTP 429: too many requests"),
        ("drop", 1, "broke off"),
    ],
)
def test_a_failure_of_the_server_is_told_in_its_own_words(client, name, fault, status, words):
    with serving(Behaviour(rates={fault: 1.0})) as server:
        done = client(name, "--url", server.url)
    assert words in only_line(done, status) and done.stdout == ""


def test_a_prompt_beyond_the_context_is_told_in_the_servers_words(client):
    with serving(Behaviour(context=3)) as server:
        assert "maximum context length is 3 tokens" in only_line(client("stream", "--url", server.url), 2)


@pytest.mark.parametrize("fault", ["not_json", "truncate", "no_choice"])
def test_an_answer_of_another_form_is_one_line(client, fault):
    with serving(Behaviour(rates={fault: 1.0})) as server:
        assert "not of OpenAI's form" in only_line(client("simple", "--url", server.url), 1)


def test_a_server_without_a_list_of_models_is_one_line(client):
    with serving(Behaviour(model_list=False)) as server:
        assert "HTTP 404: Not Found" in only_line(client("--url", server.url), 2)
        assert client("simple", "--url", server.url, "--model", "m").returncode == 0


def test_an_error_inside_a_stream_is_no_answer(client):
    with serving(Behaviour(rates={"stream_error": 1.0})) as server:
        done = client("stream", "--url", server.url)
    line = only_line(done, 1)
    assert line == "example_client: an error in the stream, so what came is not the whole answer: engine died"
    assert "finish_reason" not in done.stdout


CUT = [event("some"), event(" of it", finish_reason="length")]


@pytest.mark.parametrize("ends", [True, False], ids=["cleanly", "in the middle"])
@pytest.mark.parametrize("pieces", [CUT, CUT[:1], [*CUT, b"data: [DO"], []], ids=["whole", "part", "almost", "nothing"])
def test_a_stream_cut_before_done_is_no_answer(client, pieces, ends):
    with serving(Behaviour(), streaming(pieces, ends)) as server:
        done = client("stream", "--url", server.url)
    line = only_line(done, 1)
    assert ("ended before [DONE]" if ends else "broke off") in line
    assert "finish_reason" not in done.stdout


def test_the_same_stream_with_done_is_an_answer(client):
    with serving(Behaviour(), streaming([*CUT, b"data: [DONE]\n\n"])) as server:
        done = client("stream", "--url", server.url)
    assert (done.returncode, done.stdout) == (0, "some of it\n(? tokens, finish_reason length)\n"), done.stderr


def test_a_connection_that_drops_in_the_stream_is_no_answer(client):
    with serving(Behaviour(rates={"stream_cut": 1.0})) as server:
        done = client("stream", "--url", server.url)
    assert "broke off" in only_line(done, 1) and "finish_reason" not in done.stdout


# U+0085 and U+2028 end a line for str.splitlines, and so for httpx's iter_lines, but not in a stream.
HARD = "日本語 é 😀 \u0085 \u2028 end"
HARD_STREAM = b": a comment\n\n" + event(HARD) + event("", finish_reason="stop") + b"data: [DONE]\n\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, len(HARD_STREAM)])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_characters_spread_over_chunks_arrive_whole(client, size, line_end):
    data = HARD_STREAM.replace(b"\n", line_end)
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    with serving(Behaviour(), streaming(pieces)) as server:
        done = client("stream", "--url", server.url)
    assert done.stdout == HARD + "\n(? tokens, finish_reason stop)\n", done.stderr


def test_that_stream_is_one_that_cutting_at_every_line_end_breaks():
    with serving(Behaviour(), streaming([HARD_STREAM])) as server:
        url, body = f"{server.url}/v1/chat/completions", {"model": "m", "messages": [{"content": "x"}], "stream": True}
        with httpx.stream("POST", url, json=body, trust_env=False) as response, pytest.raises(json.JSONDecodeError):
            for line in response.iter_lines():
                json.loads(line.removeprefix("data: ") if line.startswith("data: ") else "null")


def test_text_that_the_terminal_cannot_show_is_no_crash(client):
    with serving(Behaviour(), streaming([event("é 😀", finish_reason="stop"), b"data: [DONE]\n\n"])) as server:
        done = client("stream", "--url", server.url, PYTHONIOENCODING="ascii")
    assert done.stdout.startswith("\\xe9 \\U0001f600\n"), done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_ends_it_with_one_line(started, name):
    with serving(Behaviour(rates={"stall": 1.0})) as server:
        process = started(name, "--url", server.url)
        server.wait_for_requests(8 if name == "concurrent" else 1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip(), err) == (130, "", "example_client: interrupted\n")


def test_ctrl_c_wakes_a_loop_that_is_about_to_sleep():
    """Seen once in some 200 runs where the loop's wakeup descriptor is not set: the program slept on."""

    async def wakeup_descriptor(example, settings):
        asking = asyncio.ensure_future(example.post_all(settings, [settings.question()]))
        await asyncio.sleep(0)
        found = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(found)
        asking.cancel()
        await asyncio.wait([asking])
        return found

    example = runpy.run_path(str(CLIENT))
    with serving(Behaviour(rates={"stall": 1.0})) as server:
        settings = example["Settings"](url=server.url, api_key="", model="fake", prompt="x", max_tokens=1)
        assert asyncio.run(wakeup_descriptor(SimpleNamespace(**example), settings)) != -1


@pytest.mark.parametrize(
    "arguments, env, words",
    [
        (["sync"], {}, "choose from"),
        (["--max-tokens", "many"], {}, "--max-tokens: invalid int value: 'many'"),
        (["--url", "127.0.0.1:8000"], {}, "--url='127.0.0.1:8000' (VLLM_PORT) is not valid"),
        (["--url", "ftp://host"], {}, "--url='ftp://host' (VLLM_PORT) is not valid"),
        ([], {"VLLM_PORT": "http"}, "--url='http://127.0.0.1:http' (VLLM_PORT) is not valid"),
        ([], {"VLLM_API_KEY": "schlüssel"}, "VLLM_API_KEY is not valid"),
        ([], {"VLLM_API_KEY": "two\nlines"}, "VLLM_API_KEY is not valid"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line(client, arguments, env, words):
    line = only_line(client(*arguments, **env), 2)
    assert line.startswith("example_client: ") and words in line


def test_a_prompt_that_is_no_text_is_one_line(client, server):
    done = client("simple", "--url", server.url, "--prompt", b"\xff".decode(errors="surrogateescape"))
    assert "--prompt='\\udcff' is not valid" in only_line(done, 2)


def test_without_httpx_it_says_what_to_install():
    command = [sys.executable, "-S", str(CLIENT)]  # -S: no site-packages
    done = subprocess.run(command, env=environment(), capture_output=True, encoding="utf-8", timeout=60)
    assert only_line(done, 2) == "example_client: httpx is not installed: `pip install httpx` is needed"


def test_a_reader_that_has_gone_is_no_crash(server):
    command = f"{sys.executable} {CLIENT} --url {server.url} | head -n 1"
    done = subprocess.run(command, shell=True, env=environment(), capture_output=True, encoding="utf-8", timeout=60)
    assert done.stdout.startswith("--- simple") and done.stderr == ""


def test_help_lists_the_examples(client):
    done = client("--help")
    assert done.returncode == 0 and all(name in done.stdout for name in NAMES)
