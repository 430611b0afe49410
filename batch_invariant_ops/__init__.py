"""Batch-invariant operations: one row's bits do not depend on the batch that it is computed in."""

from batch_invariant_ops._version import __version__

__all__ = ["__version__"]
