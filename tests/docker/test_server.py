"""`make vllm-compose-up-detached` ends with a healthy, private, OpenAI-compatible and batch-invariant server."""

import http.client
import json
import threading

import pytest
from kit import IMAGE, KEY, MODEL, NAME, TOKEN, docker, inspect, wait_until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]


def test_its_health_turns_healthy(server):
    wait_until(lambda: inspect(NAME, "{{.State.Health.Status}}") == "healthy", "the container is healthy")


def test_it_runs_without_privileges(server):
    assert inspect(NAME, "{{.Config.User}} {{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}}") == (
        "1000:1000 true [ALL]"
    )
    assert docker("exec", NAME, "id", "-u") == "1000"
    assert "Read-only" in docker("exec", NAME, "touch", "/opt/file", check=False)


def test_it_is_published_on_this_machine_alone(server):
    published = json.loads(inspect(NAME, "{{json .NetworkSettings.Ports}}"))
    assert published == {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": server.port}]}


def test_it_lists_its_model(server):
    status, body = server.request("/v1/models")
    assert status == 200 and [model["id"] for model in json.loads(body)["data"]] == [MODEL]


def test_it_completes(server):
    status, body = server.request("/v1/completions", {"model": MODEL, "prompt": "Hello", "max_tokens": 4})
    assert status == 200 and json.loads(body)["usage"]["completion_tokens"] > 0


def test_it_chats(server):
    messages = [{"role": "user", "content": "Hello!"}]
    status, body = server.request("/v1/chat/completions", {"model": MODEL, "messages": messages, "max_tokens": 4})
    assert status == 200 and json.loads(body)["choices"][0]["message"]["role"] == "assistant"


def test_it_streams_to_the_done_mark(server):
    asked = {"model": MODEL, "prompt": "Hello", "max_tokens": 4, "stream": True, "ignore_eos": True}
    status, body = server.request("/v1/completions", asked)
    events = [line.removeprefix("data: ") for line in body.splitlines() if line]
    assert status == 200 and events[-1] == "[DONE]" and len(events) >= 5


@pytest.mark.parametrize("key, status", [(None, 401), ("wrong", 401), (KEY + "x", 401), (KEY, 200)])
def test_the_api_key_is_asked_for(server, key, status):
    assert server.request("/v1/models", key=key)[0] == status


def test_it_says_that_it_is_batch_invariant_and_checked(server):
    metrics = server.request("/metrics", key=None)[1].splitlines()
    for gauge in ("batch_invariant_enabled", "batch_invariant_selfcheck_ok"):
        assert [line.split()[-1] for line in metrics if line.startswith(gauge)] == ["1.0"]


def test_vllm_info_shows_what_is_deployed_and_no_secret(server):
    shown = server.make("vllm-info")
    for words in ("vllm-kit-test:cpu", "running", "0.32.0", "2.13.0+cpu", "auto", ":16:8", server.url, MODEL):
        assert words in shown
    for words in ("batch_invariant_enabled", "batch_invariant_selfcheck_ok"):
        assert f"{words:<28}" in shown and "yes" in shown.split(words)[1].splitlines()[0]
    assert "set" in shown.split("HF_TOKEN")[1].splitlines()[0] and TOKEN not in shown and KEY not in shown


@pytest.mark.parametrize("target", ["vllm-logs", "vllm-compose-logs"])
def test_the_logs_are_shown_and_hold_no_secret(server, target):
    shown = server.make(target, "NO_FOLLOW=1")
    assert "Application startup complete" in shown
    assert TOKEN not in server.log() and KEY not in server.log()


def test_vllm_shell_opens_a_shell_in_the_running_container(server):
    assert "/opt/venv/bin/python 1000" in server.make("vllm-shell", stdin="echo $(command -v python) $(id -u)\n")


def test_vllm_doctor_sees_that_it_is_running(server):
    assert "already running" in server.make("vllm-doctor")


def test_vllm_test_proves_it(server):
    shown = server.make("vllm-test", "VLLM_TEST_ARGS=--requests 24 --concurrency 8", check=False)
    assert f"{server.url} is ready" in shown
    assert "SUCCESS: All outputs are identical" in shown


def test_a_second_start_is_refused_in_one_line(server):
    for target in ("vllm-compose-up-detached", "vllm-run-detached"):
        shown = server.make(target, "NO_BUILD=1", check=False)
        assert server.status == 2 and "is running already: make vllm-stop ends it" in shown


def kill_on_the_host(pid: int) -> None:
    """`docker kill` would count as a stop by the user, after which nothing is restarted."""
    docker("run", "--rm", "--pid", "host", "--user", "0", IMAGE, "sh", "-c", f"kill -9 {pid}")


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "VLLM::Worker", "main"])
def test_a_killed_process_restarts_the_container_with_the_same_bits_and_compiles_nothing(server, measured, victim):
    before, restarts, compiled = server.bits(), int(inspect(NAME, "{{.RestartCount}}")), server.compiled()
    main = int(inspect(NAME, "{{.State.Pid}}"))
    kill_on_the_host(main if victim == "main" else server.processes()[victim])
    wait_until(lambda: int(inspect(NAME, "{{.RestartCount}}")) > restarts, "the container was restarted")
    server.wait_ready()
    assert server.bits() == before
    assert compiled and server.compiled() == compiled
    wait_until(lambda: inspect(NAME, "{{.State.Health.Status}}") == "healthy", "the container is healthy again")
    first, *_, last = server.start_seconds()
    measured(f"start with empty caches {first:.0f} s, after kill -9 of {victim} {last:.0f} s: {first / last:.1f} times")


def test_a_stop_ends_within_ten_seconds_and_no_request_hangs(server):
    """Some requests fit into the drain and some do not: each is answered or closed, none is left open."""
    ends = {}
    begun = {name: threading.Event() for name in ("short", "long", "other")}

    def ask(name, tokens):
        asked = {"model": MODEL, "prompt": "Hello", "max_tokens": tokens, "ignore_eos": True}
        try:
            ends[name] = server.last_event("/v1/completions", asked, begun[name].set)
        except (OSError, http.client.HTTPException) as error:  # the connection was closed
            ends[name] = error

    threads = [threading.Thread(target=ask, args=item) for item in (("long", 1900), ("other", 1900), ("short", 128))]
    for thread in threads:
        thread.start()
    assert all(event.wait(60) for event in begun.values()), "each request gives its first token"
    docker("stop", "--time", "10", NAME)
    for thread in threads:
        thread.join(timeout=30)
    assert set(ends) == set(begun)
    assert ends["short"] == "[DONE]"
    # Docker kills with signal 9, status 137, what is still there after the ten seconds. 0 is a complete drain.
    assert inspect(NAME, "{{.State.ExitCode}}") in ("0", "143")
