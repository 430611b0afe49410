"""The Python and the curl commands of the documentation do what it says, so that it cannot rot."""

import re
import shutil
import subprocess

import pytest
from client_kit import ROOT, NamesItsModels, environment, event, only_line, spoken, streaming
from fake_server import Behaviour, serving

QUICKSTART, README = "QUICKSTART_VLLM.md", "vllm/README.md"
HELLO = spoken("Hello!")


@pytest.fixture
def documented(python_blocks):
    """documented(file, words): the one block of Python in it that has these words."""

    def find(file, words):
        (found,) = [block for block in python_blocks(file) if words in block]
        return found

    return find


def test_every_block_of_python_is_tried_here(python_blocks):
    tried = [(QUICKSTART, "import httpx"), (QUICKSTART, "OpenAI("), *((README, words) for words in OPENAI.values())]
    for file in (QUICKSTART, README):
        blocks = python_blocks(file)
        assert blocks and all(any(of == file and words in block for of, words in tried) for block in blocks)


OPENAI = {
    "sync": "answer.choices[0].logprobs.content",
    "async": "AsyncOpenAI(",
    "stream": "stream=True",
    "errors": "except openai.",
}


@pytest.mark.parametrize("words", ["import httpx", "OpenAI("])
def test_the_quick_start_prints_the_answer(documented, snippet, server, words):
    done = snippet(documented(QUICKSTART, words), server.url)
    assert (done.stdout, done.returncode) == (HELLO + "\n", 0), done.stderr


def test_one_request_prints_the_answer_and_its_logprobs(documented, snippet, server):
    done = snippet(documented(README, OPENAI["sync"]), server.url)
    text, logprobs = done.stdout.splitlines()
    assert text == HELLO and len(logprobs.split(",")) == 32, done.stderr


def test_many_at_once_print_each_prompts_own_answer(documented, snippet, server):
    done = snippet(documented(README, OPENAI["async"]), server.url)
    prompts = [f"What is {number} times {number}?" for number in range(1, 9)]
    assert done.stdout.splitlines() == [f"{prompt} -> {spoken(prompt)}" for prompt in prompts], done.stderr
    assert server.most_connections > 1


def test_a_stream_prints_the_answer(documented, snippet, server):
    done = snippet(documented(README, OPENAI["stream"]), server.url)
    assert (done.stdout, done.returncode) == (HELLO + "\n", 0), done.stderr


def test_a_stream_that_was_cut_is_no_answer(documented, snippet):
    """The documentation says that the package does not see it, hence the look at the finish reason."""
    code, cut = documented(README, OPENAI["stream"]), [event("some of it")]
    with serving(Behaviour(), streaming(cut)) as server:
        done = snippet(code, server.url)
        assert "the stream was cut" in only_line(done, 1)
        assert snippet(code.replace("if finish_reason is None", "if False"), server.url).returncode == 0


def test_a_stream_with_an_error_in_it_is_no_answer(documented, snippet):
    with serving(Behaviour(rates={"stream_error": 1.0})) as server:
        done = snippet(documented(README, OPENAI["stream"]), server.url)
    assert done.returncode != 0 and "engine died" in done.stderr


@pytest.mark.parametrize(
    "behaviour, words",
    [
        (Behaviour(api_key="secret"), "the server asks for its key: set VLLM_API_KEY to it"),
        (Behaviour(), "Error code: 404"),
        (Behaviour(model="no-such-model", rates={"error_500": 1.0}), "Error code: 500"),
    ],
    ids=["key", "model", "server"],
)
def test_each_error_is_told_by_its_own_line(documented, snippet, behaviour, words):
    with serving(behaviour, NamesItsModels) as server:
        done = snippet(documented(README, OPENAI["errors"]), server.url)
    assert done.stdout.startswith(words) and done.stdout.count("\n") == 1 and done.returncode == 0, done.stderr


def test_an_unreachable_server_is_told_by_its_own_line(documented, snippet):
    with serving(Behaviour()) as server:
        url = server.url
    assert snippet(documented(README, OPENAI["errors"]), url).stdout.startswith(f"nothing answers at {url}/v1/: ")


def test_no_error_prints_nothing(documented, snippet):
    with serving(Behaviour(model="no-such-model"), NamesItsModels) as server:
        done = snippet(documented(README, OPENAI["errors"]), server.url)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_the_key_comes_from_the_environment(documented, snippet):
    with serving(Behaviour(api_key="secret")) as server:
        for name in ("sync", "async", "stream"):
            code = documented(README, OPENAI[name])
            assert snippet(code, server.url, VLLM_API_KEY="secret").returncode == 0
            assert "401" in snippet(code, server.url).stderr


def test_the_curl_commands_get_an_answer(server):
    assert shutil.which("curl"), "curl is needed to try the documentation's commands"
    (block,) = [found for found in blocks_of_shell(QUICKSTART) if found.startswith("curl")]
    script = block.replace("http://127.0.0.1:8000", server.url).replace("curl", "curl -sS --fail")
    done = subprocess.run(["sh", "-ec", script], env=environment(), capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0 and HELLO in done.stdout and '"logprob"' in done.stdout, done.stderr


def blocks_of_shell(name):
    return re.findall(r"^```bash\n(.*?)^```$", (ROOT / name).read_text("utf-8"), re.DOTALL | re.MULTILINE)


def test_the_documentation_names_the_clients_examples(client):
    names = ["simple", "concurrent", "stream", "determinism"]
    listed = re.search(r"\{([\w,]+)\}", client("--help").stdout)
    assert listed and listed[1].split(",") == names
    for file in (QUICKSTART, README):
        text = (ROOT / file).read_text("utf-8")
        assert all(f"`{name}`" in text for name in names), file
