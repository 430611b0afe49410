"""Checks that commands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from batch_invariant_ops.cli.errors import BadInput


def above_zero(arguments: argparse.Namespace, *flags: str) -> None:
    """BadInput where one of these flags was given a number below 1."""
    for flag in flags:
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise BadInput(f"--{flag.replace('_', '-')} {value}: a whole number above 0 is needed")


def can_hold_files(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made where there is none; asked before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False
