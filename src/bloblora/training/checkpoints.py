"""Which checkpoints of a training are whole and as they were written."""

import fnmatch
import os
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any, get_type_hints

from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapter import check_folder
from ..files import check_fields, file_sha256, read_json

TRAINER_STATE_NAME = "trainer_state.json"
"""As in transformers.trainer, which takes a second to import."""

KEPT = "bloblora"
"""Where that state keeps what bloblora adds: what the next log is made of, and the hashes of the other files."""

# What a training needs to go on exactly; FSDP and DeepSpeed write folders instead of optimizer.pt.
_NEEDED = (("optimizer*", "global_step*"), ("scheduler.pt", "global_step*"), ("rng_state*.pth",))
_TENSORS = (".pt", ".pth", ".bin", ".safetensors", ".distcp")
_STATE_TYPES = {
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), float),  # shares of the steps may be given
    **{"log_history": list[dict[str, Any]], "stateful_callbacks": dict[str, Any] | None},
}


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a training, or None.

    A process that is killed while it writes leaves a folder whose files are missing or cut; such a folder is passed
    over. The Trainer writes its state last and deletes old checkpoints only after that.

    Warns:
        UserWarning: one is passed over that was complete: its files were cut or altered later.
    """
    for folder in reversed(_folders(output_dir)):
        if (problem := _problem(folder)) is None:
            return folder
        if (folder / TRAINER_STATE_NAME).is_file():
            warnings.warn(f"{folder}: passed over, for a training can't go on from it: {problem}", stacklevel=2)
    return None


def tensor_files_sha256(folder: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 of each file of tensors in a checkpoint, by its path; what callbacks write later is JSON."""
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix in _TENSORS and file.is_file())
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}


def _problem(folder: Path) -> str | None:
    """Why a training can't go on from a checkpoint, or None; one that is deleted meanwhile has a problem too."""
    try:
        state = read_json(folder / TRAINER_STATE_NAME, ValueError)
        check_fields(state, TrainerState, folder / TRAINER_STATE_NAME, ValueError, besides=_STATE_TYPES)
        if state["global_step"] != _step(folder) or not state.keys() <= get_type_hints(TrainerState).keys():
            return f"{TRAINER_STATE_NAME} is of another training"
        for adapter in _adapters(folder):
            check_folder(adapter)
        names = os.listdir(folder)
        # The Trainer's state is written after these, so a kill can't leave them out; a copy that stopped half-way can.
        for patterns in _NEEDED:
            if not any(fnmatch.filter(names, pattern) for pattern in patterns):
                return f"{patterns[0]} is missing"
        for name in names:  # torch.save writes a zip, whose directory is its end: a cut file has none
            if name.endswith((".pt", ".pth")) and not zipfile.is_zipfile(folder / name):
                return f"{name} is cut"
        kept = (state["stateful_callbacks"] or {}).get(KEPT)
        for name, digest in (kept.get("sha256", {}) if isinstance(kept, dict) else {}).items():
            if file_sha256(folder / name) != digest:
                return f"the SHA-256 of {name} isn't the one in {TRAINER_STATE_NAME}"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def remove_torn(output_dir: str | os.PathLike[str], after: str | os.PathLike[str] | None) -> None:
    """Delete incomplete checkpoints of a later step than the checkpoint ``after``, or of any where it is None.

    Where modification times say little, the Trainer's rotation takes the highest step for the newest checkpoint: it
    would keep the torn one and delete the complete one.
    """
    step = -1 if after is None else _step(Path(after))
    for folder in _folders(output_dir):
        if _step(folder) > step and _problem(folder) is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _adapters(folder: Path) -> list[Path]:
    """Folders of the adapters; none where the whole model is trained."""
    named = [file.parent for file in folder.glob("*/adapter_config.json")]
    if not named and (folder / "config.json").is_file():
        return []
    return named if named and not (folder / "adapter_config.json").exists() else [folder, *named]


def _folders(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted((p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(p) >= 0), key=_step)


def _step(folder: Path) -> int:
    step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(step) if step.isdigit() else -1
