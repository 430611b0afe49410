"""A setting that cannot work is one line that names it, its value and what is valid, and exit status 2."""

import json
import socket

import pytest
from harness_kit import SHORT


def is_usage_error(done, *words: str) -> bool:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    return True


@pytest.mark.parametrize(
    "options",
    [
        ("--requests", "0"),
        ("--requests", "-1"),
        ("--requests", "many"),
        ("--requests", "1e3"),
        ("--requests", "99999999999999999999"),
        ("--concurrency", "0"),
        ("--max-tokens", "0"),
        ("--max-tokens", "²"),
        ("--background", "-1"),
        ("--seed", "-1"),
        ("--seed", "x"),
        ("--seed", str(2**63)),
        ("--level", "bits"),
        ("--timeout", "0"),
        ("--timeout", "nan"),
        ("--timeout", "inf"),
        ("--retries", "-2"),
        ("--url", "ftp://127.0.0.1"),
        ("--url", "127.0.0.1:8000"),
        ("--url", "http://127.0.0.1:99999"),
        ("--url", "http://[::1"),
        ("--url", "http://127.0.0.1:8000/?a=b"),
        ("--url", ""),
        ("--control-url", "http://"),
        ("--endpoint", "embeddings"),
        ("--prompt", " "),
        ("--prompt-file", "no/such/file"),
        ("--prompt-file", "."),
        ("--json", "no/such/folder/result.json"),
        ("--junit", "."),
        ("--api-key", "ключ"),
    ],
    ids=" ".join,
)
def test_a_bad_value_is_named_with_what_is_valid(harness, options):
    name, value = options
    done = harness(None, *options)
    is_usage_error(done, name)
    assert (value in done.stderr) is (name != "--api-key"), "a key is never printed, everything else is"


@pytest.mark.parametrize("options", [("--request", "5"), ("--no-such",), ("5",), ("--requests",)], ids=" ".join)
def test_an_unknown_or_half_option_is_refused(harness, options):
    is_usage_error(harness(None, *options), "--help")


@pytest.mark.parametrize("port", ["abc", "0", "70000", "-1"])
def test_a_bad_port_in_the_environment_is_named(harness, port):
    is_usage_error(harness(None, VLLM_PORT=port), "VLLM_PORT", port, "from 1 to 65535")


def test_the_port_of_the_environment_is_asked(serve, harness):
    assert harness(None, *SHORT, VLLM_PORT=str(serve().port)).returncode == 0


@pytest.mark.parametrize("suffix", ["/", "/v1", "/v1/"])
def test_an_address_may_end_as_clients_write_it(serve, harness, suffix):
    assert harness(serve().url + suffix, *SHORT).returncode == 0


def test_an_address_where_nothing_answers_is_named(harness):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        is_usage_error(harness(url, "--retries", "0"), "nothing answers", url)


def test_something_that_speaks_no_http_is_no_server(harness):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        is_usage_error(harness(url, "--retries", "0", "--timeout", "0.5"), url)


def test_a_wrong_key_is_told_without_the_key(serve, harness):
    server = serve(api_key="right")
    done = harness(server, *SHORT, "--api-key", "wrong")
    is_usage_error(done, "API key", "401", "VLLM_API_KEY")
    assert "wrong" not in done.stderr
    is_usage_error(harness(server, *SHORT), "API key", "401")


def test_the_key_comes_from_the_option_or_the_environment(serve, harness):
    server = serve(api_key="right")
    assert harness(server, *SHORT, "--api-key", "right").returncode == 0
    assert harness(server, *SHORT, VLLM_API_KEY="right").returncode == 0
    assert harness(server, *SHORT, "--api-key", "right", VLLM_API_KEY="wrong").returncode == 0


def test_a_model_that_is_not_served_is_refused_with_those_that_are(serve, harness):
    is_usage_error(harness(serve(models=("a", "b")), *SHORT, "--model", "c"), "--model='c'", "a, b")


def test_several_models_need_a_choice(serve, harness):
    server = serve(models=("a", "b"))
    is_usage_error(harness(server, *SHORT), "--model", "a, b")
    assert harness(server, *SHORT, "--model", "b").returncode == 0
    assert {body["model"] for body in server.bodies} == {"b"}


def test_a_server_without_a_list_of_models_needs_a_name(serve, harness):
    server = serve(model_list=False)
    is_usage_error(harness(server, *SHORT), "--model")
    assert harness(server, *SHORT, "--model", "any").returncode == 0


def test_a_prompt_beyond_the_context_is_refused_by_number(serve, harness):
    done = harness(serve(context=50), *SHORT, "--prompt", "short", "--prompt", "long " * 60)
    is_usage_error(done, "prompt 2", "maximum context length is 50 tokens")


def test_generated_prompts_fit_into_a_small_context(serve, harness):
    assert harness(serve(context=64), *SHORT).returncode == 0


def test_each_of_the_users_prompts_gets_a_request_or_the_run_is_refused(serve, harness):
    done = harness(serve(), "--requests", "2", *(word for text in "abc" for word in ("--prompt", text)))
    is_usage_error(done, "--requests", "2", "3 prompts")


def prompts_sent(server) -> set[str]:
    """Every prompt that was asked for but the probe's."""
    return {body["prompt"] for body in server.bodies[1:]}


def test_prompts_come_from_a_text_file_a_line_each(serve, harness, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\n\r\ntwo ünder\n   \none\n".encode())
    server = serve()
    assert (
        harness(server, *SHORT, "--max-tokens", "64", "--background", "0", "--prompt-file", str(path)).returncode == 0
    )
    assert prompts_sent(server) == {"one", "two ünder"}


def test_prompts_come_from_json_lines_and_from_the_command_line_together(serve, harness, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one\\ntwo"\n{"prompt": "three", "id": 3}\n')
    server = serve()
    done = harness(
        server, *SHORT, "--max-tokens", "64", "--background", "0", "--prompt-file", str(path), "--prompt", "four"
    )
    assert done.returncode == 0
    assert prompts_sent(server) == {"one\ntwo", "three", "four"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "no prompt"),
        ("blank.txt", b" \n\n", "no prompt"),
        ("binary.txt", b"\xff\xfe\x00", "UTF-8"),
        ("bad.jsonl", b'"one"\n{"text": "two"}\n', "line 2"),
        ("cut.jsonl", b'{"prompt": "one', "line 1"),
        ("number.jsonl", b"17\n", "line 1"),
        ("deep.jsonl", b"[" * 100_000, "line 1"),
        ("space.jsonl", b'" "\n', "not empty"),
    ],
)
def test_a_bad_prompt_file_is_refused_by_name_and_line(harness, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    is_usage_error(harness(None, "--prompt-file", str(tmp_path / name)), "--prompt", words)


def requests_of(server) -> list[dict]:
    """The bodies without what must differ between two runs."""
    return [{name: value for name, value in body.items() if name != "cache_salt"} for body in server.bodies]


def sent(serve, harness, *options: str) -> list[dict]:
    server = serve()
    assert harness(server, *SHORT, "--concurrency", "1", "--background", "0", *options).returncode in (0, 3)
    return requests_of(server)


def test_one_seed_gives_one_sequence_of_requests(serve, harness):
    assert sent(serve, harness, "--seed", "5") == sent(serve, harness, "--seed", "5")
    assert sent(serve, harness, "--seed", "5") != sent(serve, harness, "--seed", "6")


def test_two_runs_never_share_a_prefix_in_the_servers_cache(serve, harness):
    server = serve()
    salts = []
    for _ in range(2):
        server.bodies.clear()
        harness(server, *SHORT)
        salts.append({body["cache_salt"] for body in server.bodies if "cache_salt" in body})
    assert salts[0]
    assert not salts[0] & salts[1]


def test_help_names_every_exit_status_and_option(harness):
    done = harness(None, "--help")
    assert done.returncode == 0
    for words in ("  0  ", "  1  ", "  2  ", "  3  ", "  130  ", "--control-url", "--prompt-file", "VLLM_API_KEY"):
        assert words in done.stdout


def test_a_disk_that_cannot_be_written_to_is_told_and_the_results_are_still_printed(serve, harness):
    done = harness(serve(), *SHORT, "--json", "/dev/full")
    assert done.returncode == 2
    assert "--json='/dev/full' could not be written" in done.stderr
    assert "✓ SUCCESS" in done.stdout


def test_json_goes_to_stdout_and_the_text_to_stderr(serve, harness):
    done = harness(serve(), *SHORT, "--json", "-")
    assert done.returncode == 0
    assert json.loads(done.stdout)["verdict"] == "pass"
    assert done.stderr.startswith("Testing determinism")


def test_stdout_can_be_given_once_only(harness):
    is_usage_error(harness(None, "--json", "-", "--junit", "-"), "--junit")
