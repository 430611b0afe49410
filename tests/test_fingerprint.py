"""A digest names every field, and never claims batch invariance for a server that is not; a model's bytes all count."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batch_invariant_ops import fingerprint, model_files

FIELDS = {"batch_invariant": True, "weights": "w", "settings": "s", "torch": "2.13.0", "threads": 4}
values = st.none() | st.booleans() | st.integers() | st.text()


def test_a_digest_says_what_kind_of_server_it_is_of():
    assert fingerprint.digest(FIELDS).startswith("bi-")
    assert fingerprint.digest(FIELDS | {"batch_invariant": False}).startswith("plain-")
    assert fingerprint.digest({}).startswith("plain-")


@pytest.mark.parametrize("name", ["weights", "settings"])
def test_an_unknown_model_gives_no_full_fingerprint(name):
    assert fingerprint.digest(FIELDS | {name: None}).startswith("partial-")


@given(st.dictionaries(st.text(), values), st.text(), values, values)
def test_a_digest_follows_every_field_and_no_order(fields, name, value, other):
    one, two = fields | {name: value}, {name: other} | {key: fields[key] for key in fields if key != name}
    same_json = json.dumps(value) == json.dumps(other)
    assert (fingerprint.digest(one) == fingerprint.digest(two)) == same_json


def test_the_digest_is_what_the_documentation_says():
    content = b'{"batch_invariant":true,"settings":"s","threads":4,"torch":"2.13.0","weights":"w"}'
    import hashlib

    assert fingerprint.digest(FIELDS) == f"bi-{hashlib.sha256(content).hexdigest()[:16]}"


INTEL = """processor : 0
vendor_id : GenuineIntel
cpu family : 6
model : 143
model name : Intel(R) Xeon(R) Platinum 8480+
stepping : 8
flags : fpu avx2 fma avx512f amx_tile amx_bf16 sse2

processor : 1
model name : another
"""


def test_a_cpu_is_told_apart_by_its_model_and_instruction_sets():
    name, flags = fingerprint.cpu(INTEL)
    assert name == "Intel(R) Xeon(R) Platinum 8480+, cpu family 6, model 143, stepping 8"
    assert flags == "avx2 fma avx512f amx_tile amx_bf16"
    assert fingerprint.cpu(INTEL.replace("amx_bf16 ", ""))[1] != flags


def test_the_flags_that_differ_only_elsewhere_do_not_matter():
    assert fingerprint.cpu(INTEL.replace("sse2", "sse4_1 rdrand")) == fingerprint.cpu(INTEL)


def test_an_arm_cpu_without_a_model_name_has_a_name():
    name, flags = fingerprint.cpu(
        "processor : 0\nCPU implementer : 0x41\nCPU part : 0xd40\nFeatures : asimd sve bf16\n"
    )
    assert "cpu part 0xd40" in name and flags == "asimd bf16 sve"


def test_the_number_of_threads_is_part_of_a_cpus_fingerprint():
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(fingerprint.device(torch.device("cpu"))["threads"])
        assert found == [1, 2]
    finally:
        torch.set_num_threads(before)


def test_only_variables_that_choose_bits_count():
    found = fingerprint.environment(
        {"ONEDNN_MAX_CPU_ISA": "AVX2", "HOME": "/x", "HF_TOKEN": "secret", "VLLM_API_KEY": "k"}
    )
    assert found == {"environment": "ONEDNN_MAX_CPU_ISA=AVX2"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "batch_invariant_ops" / "model_files.json"


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    draw = random.Random(0)
    for number in (1, 2):
        (folder / f"model-{number}.safetensors").write_bytes(draw.randbytes(3 << 20))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_one_byte_in_the_middle_of_the_weights_changes_the_hash(model):
    before = model_files.weights(model)
    with open(model / "model-2.safetensors", "r+b") as file:
        file.seek(3 << 19)
        byte = file.read(1)
        file.seek(3 << 19)
        file.write(bytes([byte[0] ^ 1]))
    assert model_files.weights(model) != before


def test_a_byte_that_changes_behind_an_unchanged_size_and_time_is_seen(model):
    file = model / "model-1.safetensors"
    before, stat = model_files.weights(model), file.stat()
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns
    assert model_files.weights(model) != before


def test_the_same_files_elsewhere_have_the_same_hash(model):
    elsewhere = model.rename(model.parent / "elsewhere")
    copy = model.parent / "copy"
    copy.mkdir()
    for file in elsewhere.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_files.weights(copy) == model_files.weights(elsewhere) is not None
    assert model_files.settings([copy]) == model_files.settings([elsewhere]) is not None


def test_what_lies_where_is_for_its_owner_to_read(model, cache):
    model_files.weights(model)
    assert cache.stat().st_mode & 0o777 == 0o600


def test_a_model_is_read_once(model, monkeypatch, cache):
    found = model_files.weights(model)
    assert cache.is_file()
    monkeypatch.setattr(model_files.hashlib, "sha256", forbidding(model_files.hashlib.sha256))
    assert model_files.weights(model) == found


def forbidding(sha256):
    """SHA-256 of short texts alone: it refuses to be fed a file."""

    class Hash:
        def __init__(self, content=b""):
            self.inner = sha256(content)

        def update(self, content):
            raise AssertionError("a file was read again")

        def hexdigest(self):
            return self.inner.hexdigest()

    return Hash


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', "\0"])
def test_a_damaged_cache_costs_a_reading_and_nothing_else(model, cache, content):
    found = model_files.weights(model)
    cache.write_text(content)
    assert model_files.weights(model) == found


def test_a_cache_with_an_entry_of_another_form_is_read_past(model, cache):
    found = model_files.weights(model)
    known = json.loads(cache.read_text())
    cache.write_text(json.dumps({name: None for name in known}))
    assert model_files.weights(model) == found


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert model_files.weights(model) == model_files.weights(model) is not None


def test_weights_that_the_index_does_not_name_are_not_loaded_and_do_not_count(model):
    found = model_files.weights(model)
    (model / model_files.INDEX).write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    (model / "consolidated.safetensors").write_bytes(b"the same again")
    assert model_files.weights(model) == found
    (model / model_files.INDEX).unlink()
    assert model_files.weights(model) != found


def test_every_setting_counts_and_a_readme_does_not(model):
    found = model_files.settings([model])
    (model / "README.md").write_text("words")
    assert model_files.settings([model]) == found
    (model / "chat_template.jinja").write_text("{{ x }}")
    assert model_files.settings([model]) != found


def test_a_folder_without_weights_has_no_hash(tmp_path):
    (tmp_path / "empty").mkdir()
    assert model_files.weights(tmp_path / "empty") is None


def test_one_file_may_be_the_whole_model(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert model_files.weights(tmp_path / "model.gguf") is not None
