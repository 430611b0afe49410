"""The doctor tells whether the model can be had: in a folder, in the cache, or at the hub and with which token."""

import json

import pytest
from fake_host import LLAMA, free_port, serving


def test_too_small_a_disk_for_the_model(host):
    def hub(path, _):
        return 200, LLAMA if "config" in path else {"siblings": [{"rfilename": "a.safetensors", "size": 2**50}]}

    with serving(hub) as url:
        report = host.examine(VLLM_MODEL="org/name", HF_ENDPOINT=url)
    assert report["Disk for the model"][0] == "failure" and "HF_CACHE" in report["Disk for the model"][2]


def test_a_gated_model(host):
    """Without a token, with one that is not let in, with one that is not valid, and with the right one."""

    def hub(path, token):
        if token == "Bearer bad":
            return 401, {}
        if "/resolve/" in path:
            return (200, LLAMA) if token == "Bearer good" else (403 if token else 401, {})
        return 200, {"gated": "manual", "siblings": [{"rfilename": "model.safetensors", "size": 2**30}]}

    with serving(hub) as url:
        asked = {"VLLM_MODEL": "org/gated", "HF_ENDPOINT": url}
        assert "HF_TOKEN is not set" in host.examine(**asked)["HF token"][1]
        assert "no access" in host.examine(**asked, HF_TOKEN="other")["HF token"][1]
        assert "does not accept" in host.examine(**asked, HF_TOKEN="bad")["HF token"][1]
        report = host.examine(**asked, HF_TOKEN="good")
        assert report.status == 0 and "let in" in report["Model"][1] and report["HF token"][0] == "ok"
        assert "good" not in json.dumps(report.findings)


def test_a_model_that_the_hub_does_not_have(host):
    with serving(lambda path, token: (404, {})) as url:
        assert "has no org/none" in host.examine(VLLM_MODEL="org/none", HF_ENDPOINT=url)["Model"][1]


@pytest.mark.parametrize("answer", [b"not json", b"[1]", b'{"siblings": [1]}', b'{"siblings": null}'])
def test_a_hub_that_answers_nonsense_is_a_warning(host, answer):
    with serving(lambda path, token: (200, answer)) as url:
        assert host.examine(VLLM_MODEL="org/name", HF_ENDPOINT=url)["Model"][0] == "warning"


def test_no_network_is_a_warning(host):
    report = host.examine(VLLM_MODEL="org/name", HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    assert report.status == 0 and report["Model"][0] == "warning" and report["GPU memory"][0] == "warning"


def test_a_model_already_in_the_cache_is_not_asked_for(host):
    host.add_model(host.cache / "hub" / "models--org--name" / "snapshots" / "1")
    report = host.examine(VLLM_MODEL="org/name", HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    assert report.status == 0 and "org/name is in" in report["Model"][1]


@pytest.mark.parametrize("spoil", ["rm", "config.json", "model.safetensors", "nonsense"])
def test_a_folder_that_holds_no_model(host, tmp_path, spoil):
    folder = host.add_model(tmp_path / "spoilt")
    if spoil == "rm":
        folder = folder / "elsewhere"
    elif spoil == "nonsense":
        (folder / "config.json").write_text("{")
    else:
        (folder / spoil).unlink()
    assert host.examine(VLLM_MODEL=str(folder))["Model"][0] == "failure"
