"""The monitoring profile, with the distribution's own Prometheus in the place of its image: it scrapes the server by
the shipped configuration, and each rule and each dashboard query returns data."""

import contextlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from kit import MODEL, ROOT, wait_until
from monitors import Prometheus

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]
MONITORING = ROOT / "vllm" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "vllm.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
RECORDED = re.findall(r"record: (\S+)", (MONITORING / "rules.yml").read_text())
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None, reason="needs the package prometheus"
)


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)


@needs_prometheus
def test_promtool_accepts_the_configuration_and_the_rules(tmp_path):
    for kind, name in (("config", "prometheus.yml"), ("rules", "rules.yml")):
        done = promtool("check", kind, MONITORING / name)
        assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / "rules.yml"
    broken.write_text((MONITORING / "rules.yml").read_text().replace("histogram_quantile(", "histogram_quantil("))
    assert promtool("check", "rules", broken).returncode != 0


@needs_prometheus
def test_each_alert_fires_where_it_should_and_none_on_a_healthy_server(tmp_path):
    cases = Path(__file__).with_name("rules_test.yml")
    done = promtool("test", "rules", cases)
    assert done.returncode == 0, done.stdout + done.stderr
    alerts = re.findall(r"alert: (\w+)", (MONITORING / "rules.yml").read_text())
    text = cases.read_text()
    assert alerts and all(f"alertname: {alert}\n" in text for alert in alerts)
    (tmp_path / "rules.yml").write_text((MONITORING / "rules.yml").read_text().replace("== 0", "== 2"))
    (tmp_path / "cases.yml").write_text(text.replace("../../vllm/monitoring/rules.yml", "rules.yml"))
    assert promtool("test", "rules", tmp_path / "cases.yml").returncode != 0


def test_grafana_finds_its_data_source_and_its_dashboard(engine):
    compose = (ROOT / "vllm" / "docker-compose.yml").read_text()
    source = (MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text()
    provider = (MONITORING / "grafana/provisioning/dashboards/vllm.yml").read_text()
    (uid,) = re.findall(r"uid: (\S+)", source)
    (folder,) = re.findall(r"path: (\S+)", provider)
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {uid}
    assert f"./monitoring/grafana/dashboards:{folder}:ro" in compose and f"DASHBOARD_PATH={folder}/vllm.json" in compose
    assert "url: http://prometheus:9090" in source and re.search(r"^  prometheus:$", compose, re.MULTILINE)


@pytest.fixture
def prometheus(server, monitors):
    """Prometheus as Compose started it beside the server, scraping it by the shipped configuration."""
    if not monitors:
        pytest.skip("needs the package prometheus")
    found = Prometheus(f"http://127.0.0.1:{monitors['PROMETHEUS_PORT']}")
    wait_until(found.is_up, "Prometheus scrapes the server")
    return found


def test_every_dashboard_query_and_every_recorded_rule_returns_data(server, prometheus):
    """Rates and quantiles need two scrapes that see requests: one is sent before each look."""
    prompt = "A prompt that is longer than a block. " * 12
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "ignore_eos": True}
    without_data = [*QUERIES, *((name, name) for name in RECORDED)]

    def all_have_had_data() -> bool:
        assert server.request("/v1/completions", asked)[0] == 200
        without_data[:] = [(title, query) for title, query in without_data if not prometheus.values(query)]
        return not without_data

    with contextlib.suppress(AssertionError):
        wait_until(all_have_had_data, "data", 60)
    assert without_data == []


def test_a_query_for_what_the_server_does_not_export_returns_none(prometheus):
    assert prometheus.values("sum(rate(vllm:no_such_thing_total[$__rate_interval]))") == []


def test_every_rule_is_evaluated_and_no_alert_fires(prometheus):
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == 10 and {rule["health"] for rule in rules} == {"ok"}
    assert [rule["name"] for rule in rules if rule["type"] == "alerting" and rule["state"] != "inactive"] == []


def test_it_says_that_the_server_is_batch_invariant_and_checked(prometheus):
    assert prometheus.values("batch_invariant_enabled") == [1.0]
    assert prometheus.values("batch_invariant_selfcheck_ok") == [1.0]
