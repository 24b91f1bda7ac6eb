"""Which checkpoints of a training are whole."""

import fnmatch
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, get_type_hints

from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapter import AdapterFileError, check_folder
from ..files import check_fields, read_json

TRAINER_STATE_NAME = "trainer_state.json"
"""As in transformers.trainer, which takes a second to import."""

# What a training needs to go on exactly; FSDP and DeepSpeed write folders instead of optimizer.pt.
_NEEDED = (("optimizer*", "global_step*"), ("scheduler.pt", "global_step*"), ("rng_state*.pth",))
_STATE_TYPES = {
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), float),  # shares of the steps may be given
    **{"log_history": list[dict[str, Any]], "stateful_callbacks": dict[str, Any] | None},
}


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a training, or None.

    A process that is killed while it writes leaves a folder whose files are missing or cut; such a folder is passed
    over. The Trainer writes its state last and deletes old checkpoints only after that.
    """
    return next((folder for folder in reversed(_folders(output_dir)) if is_complete(folder)), None)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint holds, uncut, all that a training needs to go on; not one that is deleted meanwhile."""
    try:
        state = read_json(folder / TRAINER_STATE_NAME, ValueError)
        check_fields(state, TrainerState, folder, ValueError, besides=_STATE_TYPES)
        if state["global_step"] != _step(folder) or not state.keys() <= get_type_hints(TrainerState).keys():
            return False
        for adapter in _adapters(folder):
            check_folder(adapter)
        names = os.listdir(folder)
    except (OSError, ValueError, AdapterFileError):
        return False
    # The Trainer's state is written after these, so a kill can't leave them out; a copy that stopped half-way can.
    if not all(any(fnmatch.filter(names, pattern) for pattern in patterns) for patterns in _NEEDED):
        return False
    # torch.save writes a zip, whose directory is its end: a cut file has none.
    return all(zipfile.is_zipfile(folder / name) for name in names if name.endswith((".pt", ".pth")))


def remove_torn(output_dir: str | os.PathLike[str], after: str | os.PathLike[str]) -> None:
    """Delete incomplete checkpoints of a later step than the checkpoint ``after``.

    Where modification times say little, the Trainer's rotation takes the highest step for the newest checkpoint: it
    would keep the torn one and delete the complete one.
    """
    step = _step(Path(after))
    for folder in _folders(output_dir):
        if _step(folder) > step and not is_complete(folder):
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
