"""Predictions over HTTP: several runs in one process, requests batched together, and a page to try them on."""

from .app import create_app
from .batching import Batcher, QueueFullError
from .hosted import Hosted, load_hosted, open_hosted
from .server import Server, bind, run_server
from .settings import Settings, read_keys

__all__ = [
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
