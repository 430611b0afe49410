"""The self-check passes what keeps its bits, names what does not, and its result reaches the metrics."""

import json

import pytest
import torch

import batch_invariant_ops
from batch_invariant_ops import selfcheck, status
from batch_invariant_ops.ops import linear

X = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))


def test_an_operation_by_rows_keeps_its_bits():
    assert selfcheck.keeps_bits(lambda x: torch.stack([row.exp() for row in x]), X)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + 1e-6 * len(x),
        lambda x: x + 1e-6 * torch.arange(len(x))[:, None],
        lambda x: x + 1e-6 * x.mean(),
    ],
    ids=["by batch size", "by place in the batch", "by the other rows"],
)
def test_an_operation_that_looks_beyond_its_row_is_found(operation):
    assert not selfcheck.keeps_bits(operation, X)


@pytest.mark.parametrize("shape", [selfcheck.Shape(), selfcheck.Shape(64, 7, torch.float16)])
def test_this_device_passes(shape):
    report = selfcheck.run("cpu", shape)
    assert report.ok and set(report.passed) == {"softmax", "log_softmax", "topk"}, report


@pytest.mark.parametrize("name", selfcheck.of_a_gpu(X[:7], X[7:16], X[0, :9], X[0]))
def test_what_a_gpu_is_checked_for_keeps_its_bits_on_a_cpu_in_the_mode(name):
    operation = selfcheck.of_a_gpu(X[:7], X[7:16], X[0, :9], X[0])[name]
    with batch_invariant_ops.set_batch_invariant_mode():
        assert len(operation(X)) == len(X) and selfcheck.keeps_bits(operation, X)


class TestWeights:
    """Those of products have a shape that the model has proven, where there is one."""

    SHAPE = selfcheck.Shape(64, 1000, torch.bfloat16)

    @pytest.fixture
    def proven(self, monkeypatch):
        def make(*keys):
            monkeypatch.setattr(linear, "_decisions", {(*key, 0): linear.Decision(None) for key in keys})

        return make

    def biased(self):
        return selfcheck.random_biased(self.SHAPE, lambda *sizes: torch.zeros(*sizes, dtype=torch.bfloat16))

    def test_the_narrowest_over_the_models_rows(self, proven):
        proven(
            (640, 64, torch.bfloat16, False, True), (96, 64, torch.bfloat16, False, True),
            (8, 64, torch.bfloat16, False, False), (8, 128, torch.bfloat16, False, True),
            (8, 64, torch.float16, False, True), (128, 64, torch.bfloat16, True, True),
        )  # fmt: skip
        assert selfcheck.proven_columns(self.SHAPE) == 96
        weight, bias = self.biased()
        assert weight.shape == (128, 64) and bias.shape == (128,) and bias.data_ptr() % 16 == 0

    def test_without_one_a_bias_is_where_no_vendor_adds_it(self, proven):
        proven((96, 64, torch.bfloat16, False, True))
        weight, bias = self.biased()
        assert weight.shape == (selfcheck.COLUMNS, 64) and bias.shape == (selfcheck.COLUMNS,)
        assert linear._key(X[:1].bfloat16(), weight.t(), bias) is None
        assert selfcheck.proven_columns(selfcheck.Shape(32)) == 0


def test_rows_are_as_long_as_the_models():
    made = selfcheck.operations(torch.device("cpu"), selfcheck.Shape(64, 1000))
    assert {check.length for check in made.values()} == {1000}


def test_a_failed_operation_fails_the_report(monkeypatch):
    honest = selfcheck.operations

    def one_liar(device, shape):
        return honest(device, shape) | {"liar": selfcheck.Check(lambda x: x + len(x), shape.hidden)}

    monkeypatch.setattr(selfcheck, "operations", one_liar)
    report = selfcheck.run("cpu")
    assert not report.ok and report.failed == ("liar",) and "FAILED: liar" in report.line()


def test_a_report_over_nothing_is_no_pass():
    assert not selfcheck.Report(device="x", passed=(), failed=(), seconds=0.0).ok


@pytest.fixture
def status_file(tmp_path, monkeypatch):
    file = tmp_path / "status.json"
    monkeypatch.setenv(status.VARIABLE, str(file))
    return file


def test_the_workers_result_reaches_the_process_that_answers(status_file):
    status.write({"ok": True, "device": "card"})
    assert status.read() == {"ok": True, "device": "card"}
    assert [path.name for path in status_file.parent.iterdir()] == ["status.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", None])
def test_a_missing_or_broken_status_reads_as_nothing(status_file, content):
    if content is not None:
        status_file.write_text(content)
    assert status.read() == {}


def test_a_folder_that_cannot_be_written_does_not_stop_the_worker(monkeypatch):
    monkeypatch.setenv(status.VARIABLE, "/proc/nowhere/status.json")
    status.write({"ok": True})
    assert status.read() == {}


def gauges():
    pytest.importorskip("prometheus_client")
    from prometheus_client import CollectorRegistry

    from batch_invariant_ops.integrations.prometheus import register

    registry = CollectorRegistry()
    register(registry)
    register(registry)
    return {sample.name: sample.value for metric in registry.collect() for sample in metric.samples}


@pytest.mark.parametrize("found, value", [({"ok": True}, 1.0), ({"ok": False}, 0.0), ({"ok": "yes"}, 0.0), ({}, 0.0)])
def test_the_gauge_is_one_only_after_a_check_that_passed(status_file, found, value):
    status_file.write_text(json.dumps(found))
    assert gauges() == {"batch_invariant_enabled": 1.0, "batch_invariant_selfcheck_ok": value}
