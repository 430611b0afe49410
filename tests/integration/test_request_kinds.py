"""Whatever a request asks for, its answer under load is the one that it got alone: drawn, cut, biased, bound to a form.

Against any other server, one on a GPU for instance, by `asyncio.run(differing(url))`.
"""

import asyncio
import contextlib
import random

import httpx
from real_server import KEY, SECONDS, RealServer, needs_server

KINDS = {
    "greedy": {},
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
    keys = ("token_ids", "logprobs", "finish_reason", "stop_reason", "text")
    return [
        [*(choice.get(key) for key in keys), values(choice.get("prompt_logprobs"))]
        for choice in answer.json()["choices"]
    ]


def values(prompt_logprobs: list | None) -> list | None:
    """Of each of the prompt's tokens the logprobs, without the names: several alternatives may be equally likely."""
    return prompt_logprobs and [sorted(one["logprob"] for one in at.values()) for at in prompt_logprobs if at]


async def differing(url: str, at_once: int = 1000) -> dict[str, int]:
    """By kind, how many answers under load are not what the same request got alone.

    Args:
        at_once: requests with a seed that are sent at a time. vLLM's CPU build ends with "CPU Generator does not use
            offset" where it computes the prompt of such a one in pieces, batch-invariant or not.
    """
    limits = httpx.Limits(max_connections=64)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=SECONDS, limits=limits) as client:
        waiting = asyncio.Semaphore(at_once)

        async def ask(kind: str, number: int) -> list:
            body = {"model": model} | question(kind, number)
            async with waiting if "seed" in body else contextlib.nullcontext():
                return said(await client.post("/v1/completions", json=body))

        async def crowd(load: list[tuple[str, int]]) -> list[tuple[str, bool]]:
            random.Random(0).shuffle(load)
            answers = await asyncio.gather(*(ask(*one) for one in load))
            asked = zip(load, answers, strict=True)
            return [(kind, answer != alone[kind]) for (kind, number), answer in asked if not number]

        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        alone = {kind: await ask(kind, 0) for kind in KINDS}
        drawn = [kind for kind in KINDS if "seed" in KINDS[kind]]
        others = [kind for kind in KINDS if kind not in drawn]
        beside = [("greedy", 1 + number) for number in range(OTHERS)]
        if at_once < COPIES:
            found = await crowd([(kind, 0) for kind in drawn] * COPIES)
            found += await crowd([(kind, 0) for kind in others] * COPIES + beside)
        else:
            found = await crowd([(kind, 0) for kind in KINDS] * COPIES + beside)
    assert len(found) == COPIES * len(KINDS)
    assert [len(alone[kind]) for kind in KINDS] == [KINDS[kind].get("n", 1) for kind in KINDS]
    return {kind: sum(differs for one, differs in found if one == kind) for kind in KINDS}


@needs_server
def test_each_kind_of_request_has_one_answer(batch_invariant_server: RealServer):
    found = asyncio.run(differing(batch_invariant_server.url, at_once=3))
    print(found)
    assert found == dict.fromkeys(KINDS, 0)


@needs_server
def test_of_a_plain_server_most_have_several(plain_server: RealServer):
    found = asyncio.run(differing(plain_server.url, at_once=3))
    print(found)
    assert sum(map(bool, found.values())) > len(KINDS) / 2
