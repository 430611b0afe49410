"""The command line that asks again just what was seen to differ."""

import shlex
from collections.abc import Sequence

COMMAND = "python vllm/test_determinism.py"
DROPPED = {"--mode", "--only", "--api-key", "--json", "--junit", "--report", "--minutes", "--restart-command"}
"""Options with a value that the repetition has otherwise or does without; the key is read from VLLM_API_KEY."""
KEPT_IN = {"--minutes": "soak", "--restart-command": "restart"}
DROPPED_FLAGS = {"--quiet"}


def repeat(arguments: Sequence[str], mode: str, prompt: int) -> str:
    """The same command in one mode and with one prompt, counted from 1, fit to be pasted into a shell."""
    kept: list[str] = []
    left = iter(arguments)
    for argument in left:
        name, with_value, _ = argument.partition("=")
        if name in DROPPED and KEPT_IN.get(name) != mode:
            if not with_value:
                next(left, None)
        elif argument not in DROPPED_FLAGS:
            kept.append(argument)
    own = [] if mode == "mixed" else ["--mode", mode]
    return f"{COMMAND} {shlex.join([*kept, *own, '--only', str(prompt)])}"
