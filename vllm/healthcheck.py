"""Whether a server answers /health; as a command, whether that in this container does: Docker's HEALTHCHECK.

It is run isolated, so it imports nothing of ours.
"""

import http.client
import os


def healthy(host: str, port: int, seconds: float) -> bool:
    """One request, of at most so many seconds; any answer but 200 and any error is unhealthy."""
    connection = http.client.HTTPConnection(host, port, timeout=seconds)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    raise SystemExit(0 if healthy("127.0.0.1", int(os.environ.get("VLLM_PORT") or 8000), seconds=4) else 1)
