"""A run's result as JSON, and as JUnit XML for a CI."""

import json
import math
import os
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from .client import Counters
from .errors import UsageError
from .probe import Offer
from .settings import Settings, Target
from .tally import PromptTally, Tally
from .verdict import Verdict

SCHEMA = 1


def report(
    mode: str, settings: Settings, target: Target, offer: Offer, tally: Tally, verdict: Verdict, counters: Counters
) -> dict[str, Any]:
    """The JSON report of one server, without its control; counts and seconds are as `Tally` has them."""
    return {
        "schema": SCHEMA,
        "url": target.url,
        "model": offer.model,
        "level": tally.level,
        "levels_offered": list(offer.levels),
        "requests": settings.requests,
        "concurrency": settings.concurrency,
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
        "mode": mode,
        "verdict": verdict.kind,
        "reason": verdict.reason,
        "partial": verdict.partial,
        "answered": tally.answered,
        "others": tally.others,
        "failed": tally.failed,
        "failures": [{"request": number, "kind": e.kind, "message": str(e)} for number, e in tally.failures],
        "text_variants": tally.variants("text"),
        "token_variants": tally.variants("tokens"),
        "logprob_variants": tally.variants("logprobs"),
        "identical_to_solo": tally.identical,
        "retried_connections": counters.retried_connections,
        "retried_busy": counters.retried_busy,
        "background": {"requests": tally.background_requests, "failed": tally.background_failed},
        "solo_seconds": tally.solo_seconds,
        "loaded_seconds": tally.loaded_seconds,
        "divergences": [found.to_json() for found in sorted(tally.divergences, key=lambda found: found.request)],
        "divergences_total": tally.diverged,
        "logprob_differences": tally.logprob_differences,
        "latencies": {"solo": tally.solo_latencies, "loaded": tally.loaded_latencies},
        "prompts": [of_prompt(prompt) for prompt in tally.prompts],
        "control": None,
        "power": None,
        "repeat": None,
        "server": {"version": offer.version, "system_fingerprint": offer.fingerprint},
    }


def report_of_all(verdict: Verdict, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON report of several modes, each as `report` has it."""
    return {
        "schema": SCHEMA,
        "mode": "all",
        "url": parts[0]["url"],
        "model": parts[0]["model"],
        "verdict": verdict.kind,
        "reason": verdict.reason,
        "partial": verdict.partial,
        "server": parts[0]["server"],
        "modes": parts,
    }


def of_prompt(prompt: PromptTally) -> dict[str, Any]:
    return {
        "id": prompt.prompt_id,
        "prompt_tokens": prompt.prompt_tokens,
        "text_variants": prompt.variants("text"),
        "token_variants": prompt.variants("tokens"),
        "logprob_variants": prompt.variants("logprobs"),
        "identical": prompt.identical,
        "requests": prompt.requests,
    }


def check_writable(name: str, path: str | None) -> None:
    """Refuse a path that cannot be written before a long run, not after it.

    Raises:
        UsageError: the folder is missing or not writable.
    """
    if path is None or path == "-":
        return
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise UsageError(name, path, "a file in an existing folder that can be written to is needed, or - for stdout")


def write(path: str, text: str) -> None:
    """Write a whole file or, where that fails, leave the old one as it was; - is stdout, and a device stays one."""
    if path == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def write_json(path: str, content: dict[str, Any]) -> None:
    write(path, json.dumps(finite(content), indent=1, ensure_ascii=True, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The same with null for every number that JSON has none for: an alternative's logprob may be -inf."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_junit(path: str, content: dict[str, Any]) -> None:
    """A suite a mode; in it a test case a prompt, one for the whole, one for the control. An inconclusive run is an
    error, never a pass."""
    root = ET.Element("testsuites")
    for part in content.get("modes", [content]):
        root.append(suite_of(part))
    write(path, '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n")


def suite_of(content: dict[str, Any]) -> ET.Element:
    cases: list[tuple[str, float, tuple[str, str] | None]] = []
    for prompt in content["prompts"]:
        problem = None
        if prompt["identical"] < prompt["requests"]:
            problem = ("failure", f"{prompt['requests'] - prompt['identical']} of {prompt['requests']} answers differ")
        elif not prompt["requests"]:
            problem = ("error", "no answer under load was compared")
        name = f"prompt {prompt['id'] + 1} of {prompt['prompt_tokens']} tokens is the same under load as alone"
        cases.append((name, 0.0, problem))
    if content["control"] is not None:
        caught = content["control"]["verdict"] == "fail"
        problem = None if caught else ("error", str(content["control"]["reason"]))
        cases.append(("the control is caught", 0.0, problem))
    kind = {"pass": None, "fail": "failure", "inconclusive": "error"}[content["verdict"]]
    seconds = content["solo_seconds"] + content["loaded_seconds"]
    cases.append(("the server is deterministic", seconds, (kind, content["reason"]) if kind else None))

    count = {"failure": 0, "error": 0}
    # The load that is tested where no mode is named keeps the name that it always had.
    name = "determinism" if content["mode"] == "mixed" else f"determinism.{content['mode']}"
    suite = ET.Element("testsuite", name=name, tests=str(len(cases)), time=f"{seconds:.3f}")
    for case_name, duration, problem in cases:
        case = ET.SubElement(suite, "testcase", classname=name, name=case_name, time=f"{duration:.3f}")
        if problem is not None:
            count[problem[0]] += 1
            ET.SubElement(case, problem[0], message=printable(problem[1]))
    suite.set("failures", str(count["failure"]))
    suite.set("errors", str(count["error"]))
    return suite


def printable(text: str) -> str:
    """A server's message may hold characters that XML may not."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
