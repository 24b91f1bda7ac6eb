"""uvicorn, and a stop that loses no request."""

import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..runs import RunError


class Server(uvicorn.Server):
    """Stops in two steps: ``/ready`` says so first, and what is held is finished.

    Until ``drain_seconds`` have passed new requests are still taken, because a load balancer needs that long to see
    it. Then no connection is accepted, and those that wait get their answers. A second Ctrl-C ends it at once.

    Args:
        config: uvicorn's, of an app that `create_app` made.
        drain_seconds: between the signal and the end of new connections.
        started: called with the URL once requests are taken.
    """

    def __init__(
        self, config: uvicorn.Config, drain_seconds: float = 0.0, started: Callable[[str], None] | None = None
    ) -> None:
        super().__init__(config)
        self._drain_seconds, self._on_start = drain_seconds, started
        self._stop_at: float | None = None

    @property
    def url(self) -> str:
        """Where it listens; with port 0 the system chose one."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def startup(self, *args: object, **kwargs: object) -> None:
        """Listen, and say where."""
        await super().startup(*args, **kwargs)  # type: ignore[arg-type]
        if self._on_start and self.started:
            self._on_start(self.url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, or end at once where that was begun and Ctrl-C comes again."""
        if self._stop_at is None:
            self._stop_at = time.monotonic() + self._drain_seconds
            self.config.app.state.stopping = True  # type: ignore[union-attr]
        elif sig == signal.SIGINT:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self.should_exit = True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """A port, taken before models are loaded; nothing can connect until the server runs.

    Raises:
        RunError: it can't be had.
    """
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except (OSError, OverflowError) as error:
        taken.close()
        raise RunError(f"host {host!r}, port {port}: can't listen there: {error}") from error
    return taken


def run_server(
    app: FastAPI, port: socket.socket, drain_seconds: float = 0.0, started: Callable[[str], None] | None = None
) -> None:
    """Serve until SIGTERM or Ctrl-C, on a port from `bind`."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on")
    Server(config, drain_seconds, started).run(sockets=[port])
