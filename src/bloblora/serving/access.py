"""Who may ask, and how much: looked at before a request's body is read."""

import hmac
from collections.abc import Sequence
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_OPEN = ("/", "/health", "/ready", "/openapi.json")


class Access:
    """ASGI middleware: 401 without a key, 413 for a body that is too large.

    Args:
        app: what is guarded; its page, its health and its schema stay open.
        keys: of which a request must bring one, ``Authorization: Bearer KEY``; empty: everybody may ask.
        max_body_bytes: the largest body.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], max_body_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes
        self._digests = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer itself, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if self._digests and scope["path"] not in _OPEN and not self._known(headers.get("authorization", "")):
            message = "no valid API key: send the header 'Authorization: Bearer KEY'"
            refusal = JSONResponse({"message": message, "problems": []}, 401, {"WWW-Authenticate": "Bearer"})
            await refusal(scope, receive, send)
        elif length.isdecimal() and int(length) > self._max_body_bytes:
            refusal = JSONResponse({"message": self._too_large(length), "problems": []}, 413, {"Connection": "close"})
            await refusal(scope, receive, send)
        else:
            await self._app(scope, self._counted(receive), send)

    def _known(self, authorization: str) -> bool:
        """In a time that doesn't depend on how much of a key is right, or which one it is."""
        scheme, _, key = authorization.partition(" ")
        digest = sha256(key.strip().encode("latin-1")).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(found)

    def _counted(self, receive: Receive) -> Receive:
        """For a body that doesn't say its length."""
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self._max_body_bytes:
                raise HTTPException(413, self._too_large("more"), {"Connection": "close"})
            return message

        return counted

    def _too_large(self, length: str) -> str:
        return f"the body has {length} bytes; at most {self._max_body_bytes} are taken"
