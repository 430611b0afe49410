"""Exit 0 where the server in this container answers /health, 1 where it does not: Docker's HEALTHCHECK."""

import http.client
import os


def healthy() -> bool:
    """One request to this container's own server; any answer but 200 and any error is unhealthy."""
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("VLLM_PORT") or 8000), timeout=4)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


if __name__ == "__main__":
    raise SystemExit(0 if healthy() else 1)
