"""``python -m batch_invariant_ops prove | tune``: what is measured once on a card, and kept."""

import sys

from batch_invariant_ops.cli import main

if __name__ == "__main__":
    sys.exit(main())
