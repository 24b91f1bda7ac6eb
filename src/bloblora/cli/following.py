"""What to type next."""

import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from .. import tasks
from ..data import PAPER_SETS
from ..runs import RunConfig


def program() -> str:
    """How this program is called: its name where the shell finds it, else its path, as `make demo` needs it."""
    path, found = Path(sys.argv[0]), shutil.which("bloblora")
    if path.name != "bloblora" or not path.is_file() or (found and path.samefile(found)):
        return "bloblora"
    return shlex.quote(str(path))


def after_training(config: RunConfig, task: tasks.Task) -> str:
    """The command that follows a training: evaluation on other records than its own, or a run's first texts."""
    command, run = program(), shlex.quote(config.output)
    if task.kind == "generation":
        return f"{command} generate {run} --input FILE"
    return f"{command} evaluate {run} {_other_records(str(config.source('data')))}"


def after_calibration(directory: str, of_text: str | None = None) -> str:
    """The command that follows a calibration: what became of the promises on records that it hasn't seen.

    Of texts, which `evaluate` doesn't read, it is the one whose texts they are, ``generate`` or ``score``.
    """
    if of_text is not None:
        return f"{program()} {of_text} {shlex.quote(directory)} --input FILE"
    return f"{program()} evaluate {shlex.quote(directory)} --data OTHER_FILE"


def after_demo(run: Path) -> str:
    """Commands to go on with from the demo's run, on data that the package has."""
    command, place = program(), shlex.quote(str(run))
    text = """echo '{"text": "where is my parcel"}'"""
    lines = [
        "Next, on the same run:",
        f"  {text} | {command} predict {place} --input -",
        f"  {command} calibrate {place} --data support_desk:validation --ood support_desk:out_of_scope --risk 0.3",
        f"  {command} evaluate {place} --data support_desk:test --ood support_desk:out_of_scope",
        f"  {command} serve {place}        a page at http://localhost:8000/",
        'and with your own records, {"text": …, "label": …} a line:',
        f"  {command} train --data queries.jsonl --output runs/own",
    ]
    if not all(map(find_spec, ("fastapi_offline", "uvicorn", "prometheus_client"))):
        pip = shlex.quote(sys.executable)
        lines.insert(
            4, f"  {pip} -m pip install fastapi-offline uvicorn prometheus-client        once, for the next one"
        )
    return "\n".join(lines)


def _other_records(data: str) -> str:
    """Options of `evaluate` with records that belong to training data: a split of theirs, a file beside, or FILE."""
    name, _, split = data.partition(":")
    if name == "support_desk":
        return "--data support_desk:test --ood support_desk:out_of_scope"
    if (name in PAPER_SETS or name.startswith("mmlu/")) and not Path(data).exists() and split in ("", "train"):
        return f"--data {name}:validation"
    path = Path(data)
    for other in ("test", "validation", "valid", "dev"):
        beside = path.with_name(path.name.replace("train", other))
        if beside != path and beside.exists():
            return f"--data {shlex.quote(str(beside))}"
    return "--data FILE"
