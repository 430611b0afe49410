"""The small model is the same from the same seed, and its tokenizer keeps every text and decodes every id."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
from hypothesis import given
from hypothesis import strategies as st

SMALL = replace(tiny_model.PRESETS["tiny"], hidden=64, intermediate=128, heads=2, kv_heads=1, vocab=512)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        tiny_model.make(tmp_path / name, SMALL, layers=2, seed=seed)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    first, other = contents(tmp_path / "first"), contents(tmp_path / "other")
    assert {name for name in first if first[name] != other[name]} == {n for n in first if n.endswith(".safetensors")}


def test_a_model_made_again_leaves_no_shard_of_the_older_one(tmp_path):
    tiny_model.make(tmp_path, SMALL, layers=4, seed=0)
    tiny_model.make(tmp_path, SMALL, layers=1, seed=0)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(index["weight_map"].values())


def test_transformers_loads_every_weight(tmp_path):
    transformers = pytest.importorskip("transformers")
    parameters = tiny_model.make(tmp_path, SMALL, layers=2, seed=0)
    model, loading = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.num_parameters() == parameters


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model.tokenizer(4096)


@given(text=st.text(max_size=200))
def test_tokenizer_keeps_every_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("preset", tiny_model.PRESETS.values(), ids=tiny_model.PRESETS)
def test_every_id_decodes_and_no_two_words_look_alike(preset):
    tokenizer = tiny_model.tokenizer(preset.vocab)
    assert tokenizer.get_vocab_size() == preset.vocab
    words = [tokenizer.decode([number]) for number in range(258, preset.vocab)]
    assert len(set(words)) == len(words)
    assert all(word.isascii() and word.startswith(" ") for word in words)


def test_chat_template_joins_the_messages(tmp_path):
    transformers = pytest.importorskip("transformers")
    tiny_model.make(tmp_path, SMALL, layers=1, seed=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<s>user: Hello\nassistant: "


@pytest.mark.parametrize("argument", ["--layers=0", "--seed=-1", "--preset=huge"])
def test_a_bad_argument_gets_one_line_that_names_it(tmp_path, monkeypatch, capsys, argument):
    monkeypatch.setattr(sys, "argv", ["tiny_model.py", str(tmp_path / "model"), argument])
    with pytest.raises(SystemExit, match="2"):
        tiny_model.main()
    assert argument.split("=")[0] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "model").exists()
