"""The monitoring profile without its images: Compose starts the distribution's own Prometheus in their place."""

import json
import math
import shutil
import urllib.parse
import urllib.request
from pathlib import Path

from kit import IMAGE, NAME, docker, free_port

RATE_INTERVAL = "20s"  # Grafana's: four times the data source's timeInterval of 5 s
# The layout of prom/prometheus: where it looks for its configuration, where it keeps data, and as which user.
PROMETHEUS_IMAGE = """
FROM IMAGE
COPY prometheus /bin/prometheus
RUN mkdir /prometheus && chown nobody /prometheus
USER nobody
VOLUME /prometheus
WORKDIR /prometheus
ENTRYPOINT ["/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
HEALTHCHECK NONE
"""
# Debian has no Grafana: an idle container holds its place, and its files are read by the tests.
GRAFANA_IMAGE = """
FROM IMAGE
ENTRYPOINT ["sleep", "infinity"]
HEALTHCHECK NONE
"""


def build_images(folder: Path) -> dict[str, str]:
    """Build both images on the kit's own; the settings that make Compose take them, on free ports."""
    prometheus = shutil.which("prometheus")
    assert prometheus
    shutil.copy(prometheus, folder / "prometheus")
    for name, text in (("prometheus", PROMETHEUS_IMAGE), ("grafana", GRAFANA_IMAGE)):
        (folder / "Dockerfile").write_text(text.replace("IMAGE", IMAGE))
        docker("build", "--tag", f"{NAME}:{name}", str(folder))
    return {
        "MONITORING": "1",
        "PROMETHEUS_IMAGE": f"{NAME}:prometheus",
        "GRAFANA_IMAGE": f"{NAME}:grafana",
        "PROMETHEUS_PORT": free_port(),
        "GRAFANA_PORT": free_port(),
    }


class Prometheus:
    """A running Prometheus, asked through its API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> dict:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            return json.load(answer)["data"]

    def values(self, expression: str) -> list[float]:
        """What an instant query returns, without what is not a number."""
        found = self.get("query", query=expression.replace("$__rate_interval", RATE_INTERVAL))["result"]
        return [value for value in (float(series["value"][1]) for series in found) if not math.isnan(value)]

    def is_up(self) -> bool:
        try:
            return self.values('up{job="vllm"}') == [1.0]
        except OSError:
            return False
