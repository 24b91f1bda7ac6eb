"""What Prometheus reads: requests, the queue, batches, draws, memory."""

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PATHS = ("/", "/v1/predict", "/v1/models", "/health", "/ready", "/metrics", "/openapi.json")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server, in a registry of its own.

    Args:
        queue_length: how many inputs wait.
    """

    def __init__(self, queue_length: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        kept: dict[str, Any] = {"namespace": "bloblora", "registry": self._registry}
        self._requests = Counter("requests", "Requests.", ("path", "status"), **kept)
        self._seconds = Histogram("request_seconds", "Time of a request.", ("path",), buckets=_SECONDS, **kept)
        self._sizes = Histogram("batch_size", "Inputs a batch.", ("model",), buckets=_SIZES, **kept)
        self._draws = Counter("draws", "Weight draws, summed over inputs.", ("model",), **kept)
        Gauge("queue_length", "Inputs that wait.", **kept).set_function(queue_length)

    def batch(self, model: str, size: int, draws: int) -> None:
        """Count a batch."""
        self._sizes.labels(model).observe(size)
        self._draws.labels(model).inc(draws)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)

    def counted(self, app: ASGIApp) -> ASGIApp:
        """ASGI middleware: counts and times the requests of an app."""

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            status, start = 500, time.perf_counter()

            async def noted(message: Message) -> None:
                nonlocal status
                status = message.get("status", status)
                await send(message)

            try:
                await app(scope, receive, noted)
            finally:
                path = scope["path"] if scope["path"] in _PATHS else "other"  # nobody can make names up
                self._requests.labels(path, status).inc()
                self._seconds.labels(path).observe(time.perf_counter() - start)

        return call
