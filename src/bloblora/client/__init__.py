"""The draws of an export, asked of an OpenAI-compatible server and averaged here; needs ``bloblora[client]``."""

from .client import DrawClient, DrawTexts
from .server import CompletionServer, ServerError

__all__ = ["CompletionServer", "DrawClient", "DrawTexts", "ServerError"]
