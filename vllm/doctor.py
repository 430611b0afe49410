#!/usr/bin/env python3
"""Looks at this machine and says what would keep the server from starting, each with the command that mends it.

It asks about the stack, model, port and token that the environment names, as `make vllm-compose-up` would use them:
STACK, VLLM_MODEL (or MODEL_NAME), VLLM_PORT, VLLM_BIND, MAX_MODEL_LEN, TENSOR_PARALLEL_SIZE, GPU_MEMORY_UTILIZATION,
HF_TOKEN, HF_CACHE, VLLM_SHM_SIZE. It changes nothing and needs Python alone.

Exit status: 0 where a start can work, 1 where something must be mended first, 2 for a setting that is not valid.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict

from diagnosis.engine import check_compose, check_disk, check_engine
from diagnosis.finding import FAILURE, WARNING, Finding
from diagnosis.gpu import check_gpus
from diagnosis.host import check_exposure, check_port, check_shared_memory
from diagnosis.model import find_model
from diagnosis.settings import BadSetting, Settings


def examine(settings: Settings) -> list[Finding]:
    """Every check, in the order in which a start would meet what they look at."""
    model, model_findings = find_model(settings)
    return [
        *check_engine(),
        check_compose(),
        *check_gpus(settings, model),
        *model_findings,
        *check_disk(settings, model.weight_bytes, model.is_on_disk),
        check_shared_memory(settings),
        check_port(settings),
        check_exposure(settings),
    ]


def show(settings: Settings, findings: list[Finding]) -> str:
    """The findings as lines: level, subject, sentence, and under it what mends it."""
    width = max(len(finding.subject) for finding in findings)
    lines = [f"stack {settings.stack_name} (vLLM {settings.stack.vllm}), model {settings.model}"]
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.subject:<{width}}  {finding.detail}")
        if finding.mend:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.mend}")
    levels = Counter(finding.level for finding in findings)
    if levels[FAILURE]:
        lines.append(f"{levels[FAILURE]} to mend before a start, {levels[WARNING]} to know about")
    else:
        lines.append(f"nothing stands in the way of a start, {levels[WARNING]} to know about")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    arguments = parser.parse_args()
    try:
        settings = Settings.from_environment()
    except BadSetting as error:
        print(f"doctor: {error}", file=sys.stderr)
        return 2
    findings = examine(settings)
    print(json.dumps([asdict(f) for f in findings], indent=2) if arguments.json else show(settings, findings))
    return 1 if any(finding.level == FAILURE for finding in findings) else 0


if __name__ == "__main__":
    raise SystemExit(main())
