"""The gauges that tell a monitoring system whether the server it watches is batch invariant, and checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from batch_invariant_ops import status


class BatchInvariance(Collector):
    """`batch_invariant_enabled` (1 in this mode) and `batch_invariant_selfcheck_ok` (1 once a worker's passed)."""

    def collect(self) -> Iterator[Metric]:
        found = status.read()
        labels = {name: str(found.get(name, "")) for name in ("version", "vllm", "device")}
        for name, text, value in (
            ("batch_invariant_enabled", "Whether batch-invariant mode is on.", 1.0),
            (
                "batch_invariant_selfcheck_ok",
                "Whether the worker's self-check passed at start.",
                float(found.get("ok") is True),
            ),
        ):
            gauge = GaugeMetricFamily(name, text, labels=list(labels))
            gauge.add_metric(list(labels.values()), value)
            yield gauge


_collector = BatchInvariance()


def register(registry: Any) -> None:
    """Add the gauges to a registry; a registry that has them keeps them."""
    with contextlib.suppress(ValueError):
        registry.register(_collector)
