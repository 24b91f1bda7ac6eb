"""The LoRA that a training starts from: a run's, or one that PEFT saved."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

from .. import tasks
from ..adapter import check_folder
from ..files import read_json
from .config import RunError, TrainConfig
from .folder import RUN_FILE, TASK_FILE


def lora_of(config: TrainConfig) -> LoraConfig | None:
    """The LoRA configuration of ``start_from``, trainable; None where a training starts afresh. No model is loaded.

    Raises:
        RunError: it isn't one of the same base model, rank and α, or ``targets`` or ``top_blocks`` are given as well.
        AdapterFileError: its files are damaged.
    """
    if config.start_from is None:
        return None
    folder = Path(config.start_from)
    if not folder.is_dir():
        raise RunError(
            f"start_from {config.start_from!r}: there is no such folder; give a run's, or one that PEFT saved"
        )
    lora = PeftConfig.from_pretrained(str(check_folder(folder)))
    if not isinstance(lora, LoraConfig):
        raise RunError(f"start_from {config.start_from!r}: is of type {lora.peft_type}; it must be LORA")
    found = {"rank": lora.r, "alpha": lora.lora_alpha}
    if (folder / RUN_FILE).is_file():
        found["model"] = read_json(folder / RUN_FILE, RunError).get("config", {}).get("model")
    wrong = [f"{name} {value}, not {here}" for name, value in found.items() if value != (here := getattr(config, name))]
    if wrong:
        raise RunError(f"start_from {config.start_from!r}: it has {', '.join(wrong)}; give the same")
    if given := [name for name in ("targets", "top_blocks") if getattr(config, name) is not None]:
        raise RunError(f"{given[0]}: start_from says which layers are adapted; leave it out")
    lora.inference_mode, lora.lora_dropout = False, config.dropout or 0.0
    return lora


def check_start(config: TrainConfig, task: tasks.Task) -> None:
    """Raise a RunError where ``start_from`` is a run with other labels: its head would answer with the wrong ones."""
    file = Path(config.start_from or "") / TASK_FILE
    if config.start_from is None or not file.is_file():
        return
    labels = tasks.task_from_dict(read_json(file, RunError)).labels
    if labels != task.labels:
        there, here = (", ".join(names) if names else "none" for names in (labels, task.labels))
        raise RunError(
            f"start_from {config.start_from!r}: its labels are {there}, the data's {here}; `labels` takes its own"
        )


def load_start(model: Any, folder: str) -> None:
    """Put a LoRA's weights, and its head's, into a fresh one's place.

    Raises:
        RunError: they aren't those of this model.
    """
    assert isinstance(model, PeftModel)
    weights = load_peft_weights(folder, device="cpu")
    missing = [name for name in get_peft_model_state_dict(model) if name not in weights and ".lora_" in name]
    try:
        result: Any = set_peft_model_state_dict(model, weights)
    except RuntimeError as error:  # of another size
        raise RunError(f"start_from {folder!r}: doesn't fit the model: {error}") from error
    if missing or result.unexpected_keys:
        names = ", ".join([*missing, *result.unexpected_keys][:3])
        raise RunError(f"start_from {folder!r}: doesn't fit the model: {names} are in one of them only")
