"""The report of a control and a proof: one HTML file with the verdict, the numbers and the pictures."""

import datetime
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import jinja2

from .plots import latencies, logprob_differences

HERE = Path(__file__).resolve().parent


class Verdict(Protocol):
    """What the page says on top: PASS, FAIL or INCONCLUSIVE, and why."""

    @property
    def name(self) -> str: ...

    @property
    def reason(self) -> str: ...


def cells(result: Mapping, control: Mapping) -> list[tuple[str, str]]:
    """One server's numbers: (heading, text)."""

    def ratio(key: str) -> str:
        return f"{result[key] / control[key]:.2f}" if control[key] else "-"

    return [
        ("token variants", count(result["token_variants"])),
        ("logprob variants", count(result["logprob_variants"])),
        ("identical to solo", f"{result['identical_to_solo']} of {result['requests']}"),
        ("solo, s", f"{result['solo_seconds']:.1f}"),
        ("ratio, solo", ratio("solo_seconds")),
        ("loaded, s", f"{result['loaded_seconds']:.1f}"),
        ("ratio, loaded", ratio("loaded_seconds")),
    ]


def count(variants: int | None) -> str:
    return "not offered" if variants is None else str(variants)


def facts(result: Mapping) -> list[tuple[str, str]]:
    version = (result.get("server") or {}).get("version")
    return [
        ("made", datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
        ("server", f"vLLM {version}" if version else "its version is not known"),
        ("model", str(result["model"])),
        ("machine", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("load", f"{result['requests']} requests, {result['concurrency']} at a time, other traffic beside"),
        ("compared", f"{result['level']}, up to {result['max_tokens']} tokens a request, seed {result['seed']}"),
        ("prompts", ", ".join(f"{prompt['prompt_tokens']} tokens" for prompt in result["prompts"])),
    ]


def render(verdict: Verdict, results: Mapping[str, Mapping]) -> str:
    """The page. `results` are the harness's reports (schema 1) by the server's name, the control first."""
    control, ours = results.values()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    rows = [{"name": name, "cells": cells(result, control)} for name, result in results.items()]
    return environment.get_template("report.html.j2").render(
        verdict=verdict,
        headings=[heading for heading, _ in rows[0]["cells"]],
        rows=rows,
        differences=logprob_differences(results),
        latencies=latencies(results),
        parted=[(name, result["divergences"][0]) for name, result in results.items() if result["divergences"]],
        facts=facts(ours),
    )


def write_report(path: Path, verdict: Verdict, results: Mapping[str, Mapping]) -> None:
    path.write_text(render(verdict, results), encoding="utf-8")
