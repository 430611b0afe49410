"""The report of a run, or of a control and a proof: one HTML file with the verdict, the numbers and the pictures."""

import datetime
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2

from .files import write
from .plots import latencies, logprob_differences

HERE = Path(__file__).resolve().parent
Report = Mapping[str, Any]
"""One server's result in one mode, as files.report has it (schema 1)."""
SERVER, CONTROL = "server", "control"


class Verdict(Protocol):
    """What the page says on top: PASS, FAIL or INCONCLUSIVE, and why."""

    @property
    def name(self) -> str: ...

    @property
    def reason(self) -> str: ...


def cells(result: Report, reference: Report | None) -> list[tuple[str, str]]:
    """One server's numbers in one mode: (heading, text); the ratios are to the reference's seconds."""

    def ratio(key: str) -> str:
        return f"{result[key] / reference[key]:.2f}" if reference is not None and reference[key] else "-"

    found = [
        ("token variants", count(result["token_variants"])),
        ("logprob variants", count(result["logprob_variants"])),
        ("identical to solo", f"{result['identical_to_solo']} of {result['answered']}"),
        ("solo, s", f"{result['solo_seconds']:.1f}"),
        ("ratio, solo", ratio("solo_seconds")),
        ("loaded, s", f"{result['loaded_seconds']:.1f}"),
        ("ratio, loaded", ratio("loaded_seconds")),
    ]
    return [cell for cell in found if reference is not None or not cell[0].startswith("ratio")]


def count(variants: int | None) -> str:
    return "not offered" if variants is None else str(variants)


def facts(results: Sequence[Report]) -> list[tuple[str, str]]:
    result = results[0]
    version = (result.get("server") or {}).get("version")
    found = [
        ("made", datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
        ("server", f"vLLM {version}" if version else "its version is not known"),
        ("model", str(result["model"])),
        ("harness on", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("load", f"{result['requests']} requests, {result['concurrency']} at a time, other traffic beside"),
        ("compared", f"{result['level']}, up to {result['max_tokens']} tokens a request, seed {result['seed']}"),
    ]
    for one in results:
        lengths = ", ".join(str(prompt["prompt_tokens"]) for prompt in one["prompts"])
        found.append((prefixed(one, results, "prompts' tokens"), lengths))
    return found


def prefixed(result: Report, results: Sequence[Report], text: str) -> str:
    """The text with the mode before it, where there is more than one."""
    return text if len(results) == 1 else f"{result['mode']}: {text}"


def table(results: Mapping[str, Sequence[Report]]) -> list[dict[str, Any]]:
    """A row a mode and server. The first server is the one whose time the others' are held against."""
    rows = []
    servers = list(results.items())
    for place, first in enumerate(servers[0][1]):
        for name, of_modes in servers:
            if place < len(of_modes):
                reference = first if len(servers) > 1 else None
                row_name = prefixed(of_modes[place], servers[0][1], name)
                rows.append({"name": row_name, "cells": cells(of_modes[place], reference)})
    return rows


def parted(results: Mapping[str, Sequence[Report]]) -> list[tuple[str, Mapping[str, Any], str | None]]:
    """Where each server's answers first parted in each mode: (what, divergence, command that repeats it)."""
    return [
        (prefixed(one, of_modes, name), one["divergences"][0], one.get("repeat"))
        for name, of_modes in results.items()
        for one in of_modes
        if one["divergences"]
    ]


def powers(results: Sequence[Report]) -> list[str]:
    """What is said of each mode that had no control."""
    found = []
    for one in results:
        if (power := one.get("power")) is not None:
            value = power["estimate"]
            text = "unknown, as the server gives no logprobs" if value is None else f"{value:.3f}"
            ties = "" if power["near_ties"] is None else f", {power['near_ties']} nearly tied with another"
            text += f" ({power['tokens']} tokens compared{ties}, {power['in_flight']:.1f} requests in flight)"
            found.append(prefixed(one, results, text))
    return found


def merged(results: Sequence[Report]) -> dict[str, Any]:
    """What the pictures show, over all modes."""
    return {
        "logprob_differences": [value for one in results for value in one["logprob_differences"]],
        "latencies": {
            when: [value for one in results for value in one["latencies"][when]] for when in ("solo", "loaded")
        },
    }


def render(verdict: Verdict, results: Mapping[str, Sequence[Report]], how: str) -> str:
    """The page. `results` are the reports by the server's name, the control's first; `how` says what was done."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    rows = table(results)
    together = {name: merged(of_modes) for name, of_modes in results.items()}
    own = list(results.values())[-1]
    return environment.get_template("report.html.j2").render(
        verdict=verdict,
        headings=[heading for heading, _ in rows[0]["cells"]],
        rows=rows,
        compared=len(results) > 1,
        powers=powers(own),
        differences=logprob_differences(together),
        latencies=latencies(together),
        parted=parted(results),
        how=how,
        facts=facts(own),
    )


class _Said:
    """A verdict as a JSON report has it."""

    def __init__(self, content: Report) -> None:
        self.name, self.reason = content["verdict"].upper(), content["reason"]


def page(content: Report) -> str:
    """The page of the harness's own JSON report, of one mode or of several."""
    own: list[Report] = list(content.get("modes") or [content])
    controls = [one["control"] for one in own if one["control"] is not None]
    results: dict[str, Sequence[Report]] = {CONTROL: controls, SERVER: own} if controls else {SERVER: own}
    how = "Each prompt was sent alone to an idle server; then many copies of all prompts, with other traffic beside."
    how += " The control is a plain server of the same model under the same load." if controls else ""
    return render(_Said(content), results, how)


def write_report(path: str, content: Report) -> None:
    """Write the page of a JSON report; whole, or not at all."""
    write(path, page(content))
