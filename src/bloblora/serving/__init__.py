"""Predictions over HTTP: several runs in one process, requests batched together, and a page to try them on.

Names are imported when they are used: `Settings` needs no HTTP library, the others ``bloblora[serve]``.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .app import create_app
    from .hosted import Hosted, Settings, load_hosted, open_hosted
    from .server import Batcher, QueueFullError, Server, bind, read_keys, run_server
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "app": ("create_app",),
            "hosted": ("Hosted", "Settings", "load_hosted", "open_hosted"),
            "server": ("Batcher", "QueueFullError", "Server", "bind", "read_keys", "run_server"),
        },
    )

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
