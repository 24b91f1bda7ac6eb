"""Runs on the Hugging Face hub: ``hub:user/name`` stands where a run's folder is read."""

import os
from functools import cache
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HTTPError  # the HTTP library's: it differs between versions

from .config import RunError

PREFIX = "hub:"
_FILES = ["*.json", "*.safetensors", "reliability*.png"]  # nothing that could be run


def local_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder itself, or a copy of the hub's: of ``hub:user/name``, or ``hub:user/name@revision``.

    Copies are kept in huggingface_hub's cache, which also serves without a network. A process sees one state of a
    repository, however often it asks.

    Raises:
        RunError: the hub can't be reached or has no such repository or revision, and no copy is there.
    """
    name = os.fspath(directory)
    return _fetched(name) if is_remote(name) else Path(name)


def own_name(directory: str | os.PathLike[str]) -> str:
    """What a run is called where nothing else is said: its folder's name, or its repository's."""
    if is_remote(directory):
        return os.fspath(directory).removeprefix(PREFIX).partition("@")[0].rpartition("/")[2]
    return Path(directory).resolve().name


def is_remote(directory: str | os.PathLike[str]) -> bool:
    """Whether this stands for a repository of the hub."""
    return os.fspath(directory).startswith(PREFIX)


@cache
def _fetched(name: str) -> Path:
    repo_id, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=_FILES))
    except (OSError, ValueError, HTTPError) as error:
        raise RunError(f"{name}: can't be fetched from {constants.ENDPOINT}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What a hub's client says was wrong, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
