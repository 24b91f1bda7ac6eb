"""What stands between a port and the models: uvicorn, API keys, and the queue that joins requests in one forward."""

import asyncio
import gc
import hmac
import math
import re
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from threading import Condition, Thread
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..checks import is_key
from ..runs import RunError
from .schema import event, failure

DOCS_FILES = "/docs/files"
GRACE_SECONDS = 30.0
_CLOSE = {"Connection": "close"}
T = TypeVar("T")
_OPEN = ("/", "/health", "/ready", "/docs", "/openapi.json")


class Server(uvicorn.Server):
    """Stops in two steps: ``/ready`` says so first, and what is held is finished.

    Until ``drain_seconds`` have passed new requests are still taken, because a load balancer needs that long to see
    it. Then no connection is accepted, and those that wait get their answers, for at most ``grace_seconds``, or else
    status 503. A second signal ends the process at once. The app is one that `create_app` made; ``started`` is called
    with the URL once requests are taken.
    """

    def __init__(
        self,
        app: FastAPI,
        drain_seconds: float = 0.0,
        grace_seconds: float = GRACE_SECONDS,
        started: Callable[[str], None] | None = None,
    ) -> None:
        options: dict[str, Any] = {"http": "h11", "ws": "none", "lifespan": "on"}
        grace = math.ceil(grace_seconds)
        super().__init__(
            uvicorn.Config(app, **options, log_level="warning", access_log=False, timeout_graceful_shutdown=grace)
        )
        self._state, self._drain_seconds, self._on_start = app.state, drain_seconds, started
        self._stop_at: float | None = None
        self._idle: dict[tuple[Any, Any], float] = {}

    @property
    def url(self) -> str:
        """Where it listens; with port 0 the system chose one."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def startup(self, *args: object, **kwargs: object) -> None:
        """Listen, and say where."""
        gc.freeze()  # else a body of many lists makes the collector go through all that is loaded, for seconds
        await super().startup(*args, **kwargs)  # type: ignore[arg-type]
        if self._on_start and self.started:
            self._on_start(self.url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, or where that was begun end the process as the signal does by default."""
        if self._stop_at is not None:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._stop_at = time.monotonic() + self._drain_seconds
        self._state.stopping = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: drop connections that send no header, and say whether to end."""
        now = time.monotonic()
        if self._stop_at is not None and now >= self._stop_at:
            self.should_exit = True
        self._drop_idle(now)
        return await super().on_tick(counter)

    def _drop_idle(self, now: float) -> None:
        """End connections without a request for too long: uvicorn does so only between two, where nothing has come."""
        connections: set[Any] = {*self.server_state.connections}
        idle = [(one, one.cycle) for one in connections if one.cycle is None or one.cycle.response_complete]
        self._idle = {key: self._idle.get(key, now) for key in idle}  # a new request has a new cycle
        for (connection, _), since in self._idle.items():
            if now - since > self._state.read_seconds:
                connection.transport.abort()


def bind(host: str, port: int) -> socket.socket:
    """A port, taken before models are loaded, or a RunError; nothing can connect until the server runs."""
    # With a protocol of 0 asyncio doesn't set TCP_NODELAY, and answers on a kept connection come 40 ms late.
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except (OSError, OverflowError) as error:
        taken.close()
        raise RunError(f"host {host!r}, port {port}: can't listen there: {error}") from error
    return taken


def run_server(
    app: FastAPI,
    port: socket.socket,
    drain_seconds: float = 0.0,
    grace_seconds: float = GRACE_SECONDS,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, on a port from `bind`."""
    Server(app, drain_seconds, grace_seconds, started).run(sockets=[port])


def read_keys(file: str | Path) -> tuple[str, ...]:
    """API keys, one a line; empty lines and those that start with # are left out.

    Raises:
        RunError: the file can't be read, holds no key, or one that an HTTP header can't carry.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"api_key_file {str(file)!r}: can't be read: {error}") from error
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise RunError(f"api_key_file {str(file)!r}: there is no key in it; write one a line")
    for number, key in enumerate(keys, start=1):
        if not is_key(key):
            raise RunError(f"api_key_file {str(file)!r}: key {number} has characters other than visible ASCII")
    return keys


class Access:
    """ASGI middleware, which refuses what doesn't reach the app's own checks.

    - 401 without one of the keys, where there are any; the page, the health, the schema and its page need none.
    - 421 where there are no keys and the Host header has a name that isn't one of ``hosts``, ``localhost`` or an IP
      address: another site's script whose own name was made to point here (DNS rebinding).
    - 413 for a body that is too large, and 408 for one that hasn't arrived after ``read_seconds``.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], hosts: Sequence[str], max_body_bytes: int, read_seconds: float
    ) -> None:
        self._app, self._max_body_bytes, self._read_seconds = app, max_body_bytes, read_seconds
        self._digests = [sha256(key.encode()).digest() for key in keys]
        self._hosts = {"localhost", *(host.strip().lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer itself, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, app = Headers(scope=scope), self._app
        length, host = headers.get("content-length", "0"), headers.get("host")
        path = scope["path"]
        is_open = path in _OPEN or path.startswith(f"{DOCS_FILES}/")
        if self._digests and not is_open and not self._known(headers.get("authorization", "")):
            message = "no valid API key: send the header 'Authorization: Bearer KEY'"
            app = _refusal(path, 401, message, {"WWW-Authenticate": "Bearer"})
        elif not self._digests and host is not None and not self._ours(host):
            app = _refusal(
                path, 421, f"host {host[:80]!r}: not a name of this server; add it to --allowed-hosts, or use keys"
            )
        elif length.isdecimal() and int(length) > self._max_body_bytes:
            app = _refusal(path, 413, self._too_large(length), _CLOSE)
        await app(scope, self._limited(receive), send)

    def _known(self, authorization: str) -> bool:
        """In a time that doesn't depend on how much of a key is right, or which one it is."""
        scheme, _, key = authorization.partition(" ")
        digest = sha256(key.strip().encode("latin-1")).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(found)

    def _ours(self, host: str) -> bool:
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        try:
            ip_address(name)
        except ValueError:
            return name in self._hosts or "*" in self._hosts
        return True

    def _limited(self, receive: Receive) -> Receive:
        """The body, while it isn't longer than it may be or said, and in time."""
        total, more, end = 0, True, time.monotonic() + self._read_seconds

        async def limited() -> Message:
            nonlocal total, more
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic() if more else None)
            except TimeoutError as error:
                raise HTTPException(408, f"the body didn't arrive in {self._read_seconds:g} s", _CLOSE) from error
            total += len(message.get("body", b""))
            more = message.get("more_body", False)
            if total > self._max_body_bytes:
                raise HTTPException(413, self._too_large("more"), _CLOSE)
            return message

        return limited

    def _too_large(self, length: str) -> str:
        return f"the body has {length} bytes; at most {self._max_body_bytes} are taken"


def ended(app: ASGIApp) -> ASGIApp:
    """ASGI middleware: requests that are open when the server's grace is over get status 503, streams a last event."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        headers: Headers | None = None
        complete = False

        async def noted(message: Message) -> None:
            nonlocal headers, complete
            if message["type"] == "http.response.start":
                headers = Headers(raw=message["headers"])
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await app(scope, receive, noted)
        except asyncio.CancelledError:  # by uvicorn, which would send a status 500
            message = "the server has stopped before the answer was complete"
            if headers is None:
                await _refusal(scope["path"], 503, message, _CLOSE)(scope, receive, send)
            elif headers.get("content-type", "").startswith("text/event-stream") and not complete:
                last = event(failure(scope["path"], 503, message)).encode()
                with suppress(asyncio.CancelledError):  # the second, where the client reads nothing
                    await send({"type": "http.response.body", "body": last, "more_body": False})

    return call


def _refusal(path: str, status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(failure(path, status, message), status, headers)


async def unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """Wait for a request's answer, which is cancelled with an HTTPException of status 499 when its client goes away."""
    whole, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnected(request))
    whole.add_done_callback(lambda done: done.cancelled() or done.exception())  # else the log has each that was left
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            raise HTTPException(499, "the client has gone")  # which nobody reads, but is counted
        return await whole
    finally:
        whole.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class QueueFullError(RuntimeError):
    """No room for a request's inputs; there should be in ``retry_after`` seconds, at least 1."""

    def __init__(self, waiting: int, limit: int, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"{waiting} inputs wait, of at most {limit}; come again in {retry_after} s")


class Batcher:
    """Calls a function on what waits, in one thread, until it is closed.

    A batch is of the oldest input and those of the same key, in their order. It is taken when there are ``max_batch``
    of them, or when the oldest has waited ``max_wait_ms`` milliseconds. At most ``limit`` inputs wait, of which those
    whose future was cancelled are none. ``answer`` takes a key and the inputs and returns as many answers; an error is
    every one's answer.
    """

    def __init__(
        self, answer: Callable[[Any, list[Any]], Sequence[Any]], max_batch: int, max_wait_ms: float, limit: int
    ) -> None:
        self._answer, self._max_batch, self._max_wait, self._limit = answer, max_batch, max_wait_ms / 1000, limit
        self._waiting: list[_Input] = []
        self._changed = Condition()
        self._closed = False
        self._batch_seconds, self._began = 0.0, math.inf  # of the last batch, and of the one in progress
        self._thread = Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Inputs that wait."""
        return sum(not input_.answer.cancelled() for input_ in self._waiting)

    def submit(self, key: Hashable, inputs: Sequence[Any]) -> list[Future[Any]]:
        """Put inputs in the queue: all or none, with a QueueFullError; a RuntimeError once the batcher is closed."""
        added = [_Input(key, value) for value in inputs]
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._waiting = [input_ for input_ in self._waiting if not input_.answer.cancelled()]
            if len(self._waiting) + len(added) > self._limit:
                raise QueueFullError(len(self._waiting), self._limit, self._seconds_left())
            self._waiting.extend(added)
            self._changed.notify()
        return [input_.answer for input_ in added]

    def close(self) -> None:
        """Answer what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _seconds_left(self) -> int:
        """Until what waits is answered, if each batch takes as long as the last, or as the one in progress so far."""
        a_batch = max(self._batch_seconds, time.monotonic() - self._began)
        return max(1, math.ceil((1 + len(self._waiting) / self._max_batch) * a_batch))

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            batch = [input_ for input_ in taken if input_.answer.set_running_or_notify_cancel()]
            if not batch:  # whoever asked has gone
                continue
            self._began = time.monotonic()
            try:
                answers = self._answer(batch[0].key, [input_.value for input_ in batch])
                for input_, answer in zip(batch, answers, strict=True):
                    input_.answer.set_result(answer)
            except Exception as error:
                for input_ in batch:
                    if not input_.answer.done():
                        input_.answer.set_exception(error)
            self._batch_seconds, self._began = time.monotonic() - self._began, math.inf

    def _take(self) -> list["_Input"] | None:
        """Take the oldest input and others like it out of the queue; None when closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            left = self._waiting[0].since + self._max_wait - time.monotonic()
            self._changed.wait_for(lambda: self._closed or len(self._alike()) == self._max_batch, left)
            batch = self._alike()
            self._waiting = [input_ for input_ in self._waiting if input_ not in batch]
            return batch

    def _alike(self) -> list["_Input"]:
        return [input_ for input_ in self._waiting if input_.key == self._waiting[0].key][: self._max_batch]


@dataclass(eq=False)
class _Input:
    key: Hashable
    value: Any
    since: float = field(default_factory=time.monotonic)
    answer: Future[Any] = field(default_factory=Future)
