"""What each command does, a file a group."""

from collections.abc import Callable
from importlib.metadata import version as package_version

from ...demo import demo
from .about import info, list_methods
from .export import export
from .generate import generate
from .hub import card, push
from .run import calibrate, evaluate, predict, train
from .serve import serve
from .study import compare, report, tune

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "calibrate": calibrate,
    "evaluate": evaluate,
    "predict": predict,
    "serve": serve,
    "generate": generate,
    "export": export,
    "card": card,
    "push": push,
    "demo": demo,
    "compare": compare,
    "report": report,
    "tune": tune,
    "methods": list_methods,
    "info": info,
}


def version() -> str:
    """The package's version."""
    return package_version("bloblora")
