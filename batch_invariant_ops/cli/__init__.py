"""The command line: one module a command, each with ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from batch_invariant_ops.cli import prove, tune
from batch_invariant_ops.cli.errors import BadInput

COMMANDS = {"prove": prove, "tune": tune}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m batch_invariant_ops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary, _, rest = (module.__doc__ or "").partition("\n")
        command = commands.add_parser(
            name, help=summary, description=summary + rest, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
    chosen = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        return COMMANDS[chosen.command].run(chosen)
    except BadInput as error:
        print(f"{parser.prog} {chosen.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
