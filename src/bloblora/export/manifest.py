"""What an export is: ``manifest.json``, by which a client asks a server and a reader checks the files."""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import tasks
from ..files import file_sha256, read_json, write_json
from ..runs import RunError

MANIFEST_FILE, FORMAT_VERSION = "manifest.json", 1


@dataclass(frozen=True)
class Manifest:
    """An export's description.

    Attributes:
        format: ``lora``, ``merged`` or ``gguf``.
        base_model: what the adapters belong to, as ``from_pretrained`` takes it.
        method: of the run.
        adapter_sha256: of the run's weights.
        num_samples: weight draws N that were asked for; 0 is the posterior mean.
        seed: of the draws.
        mean: the mean's name, or None where it isn't there.
        draws: names of the draws in order; a server must serve them by these. A file or folder has the same name.
        task: how records become prompts and answers, for `bloblora.tasks.task_from_dict`.
        commands: what to run in the export's folder, by program.
        warnings: what the files can't do.
        libraries: versions that made them.
        files: SHA-256 of each file, by its path in the folder.
    """

    format: str
    base_model: str
    method: str
    adapter_sha256: str | None
    num_samples: int
    seed: int
    mean: str | None
    draws: list[str]
    task: dict[str, Any]
    commands: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    libraries: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> "Manifest":
        """Write it beside the files that it describes; returns it with their hashes."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest = replace(self, files={path.relative_to(folder).as_posix(): file_sha256(path) for path in files})
        write_json(folder / MANIFEST_FILE, {"format_version": FORMAT_VERSION, **asdict(manifest)})
        return manifest


def read_manifest(directory: str | os.PathLike[str], *, check_files: bool = False) -> Manifest:
    """The manifest of an export's folder.

    Args:
        directory: the folder.
        check_files: also compare the SHA-256 of each file, which reads them all.

    Raises:
        RunError: there is none, another version wrote it, or a file is missing or altered.
    """
    file = Path(directory) / MANIFEST_FILE
    content = read_json(file, RunError)
    if (found := content.pop("format_version", None)) != FORMAT_VERSION:
        raise RunError(f"{file}: format_version is {found!r}; this bloblora reads {FORMAT_VERSION}")
    try:
        manifest = Manifest(**content)
        tasks.task_from_dict(manifest.task)
    except (TypeError, ValueError) as error:
        raise RunError(f"{file}: not what `bloblora export` writes: {error}") from error
    for name, expected in manifest.files.items() if check_files else ():
        if not (path := file.parent / name).is_file() or file_sha256(path) != expected:
            raise RunError(f"{path}: missing, or its SHA-256 isn't the one in {MANIFEST_FILE}; export again")
    return manifest
