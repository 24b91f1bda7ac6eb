"""What each command does, a file a group."""

from collections.abc import Callable
from importlib.metadata import version as package_version

from ...demo import demo
from .about import info, list_methods
from .generate import generate
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
