"""Each example runs by name and all run in turn, and a server that is not deterministic is told from one that is."""

import pytest
from client_kit import only_line, spoken
from fake_server import Behaviour, serving

PROMPT = "Tell me about the sea."


def test_simple_prints_the_answer(client, server):
    done = client("simple", "--url", server.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, spoken(PROMPT) + "\n", "")


def test_concurrent_prints_each_prompts_own_answer_and_has_them_in_flight_together(client, server):
    done = client("concurrent", "--url", server.url)
    prompts = [f"{PROMPT} (question {number})" for number in range(1, 9)]
    assert done.stdout.splitlines() == [f"{prompt} -> {spoken(prompt)}" for prompt in prompts], done.stderr
    assert server.most_connections > 1


def test_stream_prints_the_answer_and_how_it_ended(client, server):
    done = client("stream", "--url", server.url)
    assert done.stdout == spoken(PROMPT) + "\n(32 tokens, finish_reason length)\n", done.stderr
    assert server.bodies[0]["stream"] is True


def test_determinism_compares_copies_among_other_traffic_with_the_answer_alone(client, server):
    done = client("determinism", "--url", server.url)
    assert done.stdout == "16 of 16 copies are identical to the answer alone, in text and 32 logprobs\n", done.stderr
    prompts = [body["messages"][0]["content"] for body in server.bodies]
    assert prompts[0] == PROMPT and prompts.count(PROMPT) > 16 and len(set(prompts)) >= 16


@pytest.mark.parametrize("fault", ["logprob", "token", "text", "swap", "nan", "no_logprobs"])
def test_determinism_fails_on_a_server_whose_answers_change(client, fault):
    with serving(Behaviour(rates={fault: 1.0}, faults_from=1)) as server:
        done = client("determinism", "--url", server.url)
    assert "copies differ from the answer alone, the first in its t" in only_line(done, 1)
    assert done.stdout == ""


def test_determinism_says_where_answers_part(client):
    with serving(Behaviour(rates={"logprob": 1.0}, faults_from=1)) as server:
        line = only_line(client("determinism", "--url", server.url, "--max-tokens", "5"), 1)
    assert line.startswith(
        "example_client: 16 of 16 copies differ from the answer alone, the first in its token 4: (' w"
    )


def test_determinism_says_that_it_saw_text_alone(client):
    with serving(Behaviour(logprobs=False)) as server:
        done = client("determinism", "--url", server.url)
    assert "in text alone: the server gives no logprobs" in done.stdout and done.returncode == 0


def test_determinism_proves_nothing_by_empty_answers(client):
    with serving(Behaviour(empty=True, logprobs=False)) as server:
        assert "nothing to compare" in only_line(client("determinism", "--url", server.url), 1)


def test_without_a_name_all_run_in_turn(client, server):
    done = client("--url", server.url)
    headings = [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("--- ")]
    assert headings == ["--- simple", "--- concurrent", "--- stream", "--- determinism"], done.stderr
    assert done.returncode == 0 and done.stderr == ""


def test_all_in_turn_fail_where_one_fails(client):
    with serving(Behaviour(rates={"logprob": 1.0})) as server:  # each copy is off by as much as the answer alone
        assert client("--url", server.url).returncode == 0
    with serving(Behaviour(rates={"logprob": 1.0}, faults_from=11)) as server:
        done = client("--url", server.url)
    assert "copies differ" in only_line(done, 1) and "--- determinism" in done.stdout


def test_the_settings_reach_the_server(client, server):
    done = client(
        "simple", "--url", server.url + "/v1/", "--prompt", "Wie spät? 🕰", "--max-tokens", "3", "--model", "m"
    )
    assert done.stdout == spoken("Wie spät? 🕰", 3) + "\n", done.stderr
    assert [(body["model"], body["temperature"]) for body in server.bodies] == [("m", 0)]


def test_the_port_and_the_key_come_from_the_environment_and_no_proxy_is_asked(client):
    with serving(Behaviour(api_key="secret")) as server:
        proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9"}
        done = client("simple", VLLM_PORT=str(server.port), VLLM_API_KEY="secret", **proxies)
    assert (done.returncode, done.stdout) == (0, spoken(PROMPT) + "\n"), done.stderr
