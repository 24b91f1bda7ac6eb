"""Predictions over HTTP: several runs in one process, requests batched together, and a page to try them on."""

from .app import create_app
from .hosted import Hosted, Settings, load_hosted, open_hosted
from .server import GRACE_SECONDS, Batcher, QueueFullError, Server, bind, read_keys, run_server

__all__ = [
    "GRACE_SECONDS",
    "Batcher",
    "Hosted",
    "QueueFullError",
    "Server",
    "Settings",
    "bind",
    "create_app",
    "load_hosted",
    "open_hosted",
    "read_keys",
    "run_server",
]
