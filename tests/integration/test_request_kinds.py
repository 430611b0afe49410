"""Whatever a request asks for, its answer under load is the one that it got alone: drawn, cut, biased, bound to a form.

Against any other server, one on a GPU for instance, by `asyncio.run(differing(url))`.
"""

import asyncio
import random
from collections.abc import Iterable

import httpx
from real_server import KEY, SECONDS, RealServer, needs_server

KINDS = {
    "greedy": {},
    "greedy, with as many alternatives as there are": {"logprobs": 20},
    "several answers": {"n": 3, "temperature": 0.9, "seed": 5},
    "drawn": {"temperature": 1.0, "seed": 1},
    "drawn, of the likeliest": {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 2},
    "drawn, not of the unlikely": {"temperature": 1.2, "min_p": 0.05, "seed": 3},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "biased": {"logit_bias": {"100": 8, "200": 8, "300": -100}},
    "stopped": {"stop": ["e", "7"], "include_stop_str_in_output": True},
    "stopped at a token": {"stop_token_ids": [*range(50, 1500, 7)]},
    "without some words": {"bad_words": ["a", "the"]},
    "of a choice": {"structured_outputs": {"choice": ["yes, it is", "no, it is not"]}},
    "of a form": {"structured_outputs": {"regex": "[a-f]{20,30}"}},
    "the prompt's logprobs": {"prompt_logprobs": 2, "max_tokens": 4},
    "more of the prompt's logprobs": {"prompt_logprobs": 20, "max_tokens": 4},
    "echo": {"echo": True, "max_tokens": 8},
}
COPIES, OTHERS = 6, 24


def question(kind: str, number: int) -> dict:
    words = random.Random(f"{kind} {number}")
    prompt = " ".join(words.choice(("river", "stone", "7", "light", "of", "the", "north")) for _ in range(20 + number))
    return {"prompt": prompt, "max_tokens": 32, "temperature": 0, "logprobs": 3, "return_token_ids": True} | KINDS[kind]


def said(answer: httpx.Response) -> list:
    """All that the server computed, to the last bit."""
    assert answer.status_code == 200, answer.text
    keys = ("token_ids", "logprobs", "prompt_logprobs", "finish_reason", "stop_reason", "text")
    return [[choice.get(key) for key in keys] for choice in answer.json()["choices"]]


async def differing(url: str, kinds: Iterable[str] = KINDS) -> dict[str, int]:
    """By kind, how many answers under load are not what the same request got alone."""
    limits = httpx.Limits(max_connections=64)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=SECONDS, limits=limits) as client:

        async def ask(kind: str, number: int) -> list:
            return said(await client.post("/v1/completions", json={"model": model} | question(kind, number)))

        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        alone = {kind: await ask(kind, 0) for kind in kinds}
        load = [(kind, 0) for kind in kinds] * COPIES + [("greedy", 1 + number) for number in range(OTHERS)]
        random.Random(0).shuffle(load)
        answers = await asyncio.gather(*(ask(*one) for one in load))
    found = dict.fromkeys(kinds, 0)
    for (kind, number), answer in zip(load, answers, strict=True):
        found[kind] += not number and answer != alone[kind]
    assert [len(alone[kind]) for kind in kinds] == [KINDS[kind].get("n", 1) for kind in kinds]
    return found


@needs_server
def test_each_kind_of_request_has_one_answer(batch_invariant_server: RealServer):
    found = asyncio.run(differing(batch_invariant_server.url))
    print(found)
    assert found == dict.fromkeys(KINDS, 0)


@needs_server
def test_of_a_plain_server_most_have_several(plain_server: RealServer):
    """Without seeds: a plain CPU server ends where it computes the prompt of such a request in pieces."""
    kinds = [kind for kind in KINDS if "seed" not in KINDS[kind]]
    found = asyncio.run(differing(plain_server.url, kinds))
    print(found)
    assert sum(map(bool, found.values())) > len(kinds) / 2
