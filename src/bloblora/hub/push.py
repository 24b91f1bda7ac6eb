"""A run's folder on the hub: exactly the files that it needs to load, and a card."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError  # the HTTP library's: it differs between versions
from huggingface_hub.utils import validate_repo_id

from ..adapter.storage import MEAN_CONFIG
from ..files import read_json, write_json, write_text
from ..messages import quoted
from ..models import DEFAULT_MODEL
from ..runs import RunDescription, RunError, load_run, open_run
from ..runs.evaluate import METRICS_FILE, read_metrics
from ..runs.folder import VALIDATION_FIGURE, is_remote, read_run_file, reason, write_run_file
from .card import CARD_FILE, is_generated, model_card, public_base, public_name

_PICTURES = ("reliability*.png", VALIDATION_FIGURE)
_PATTERNS = ("run.json", "task.json", "decision.json", "correctness.json", "distance.*", METRICS_FILE, *_PICTURES)
_PLACES = ("data", "validation", "output", "trunk_cache", "start_from", "prior_from")


def push(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    update: bool = False,
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Upload a finished run to the hub, as a model repository that `bloblora.runs.load_run` and PEFT load.

    What goes up is what a run needs, its metrics, decisions and card: no checkpoints and no training records, and of
    local files no more than their names. The README.md is made anew unless someone has written it. The copy that is
    uploaded has been loaded before. The token is huggingface_hub's (``hf auth login``, or HF_TOKEN). Returns the
    address of the commit.

    Args:
        directory: folder of the run.
        repo_id: ``user/name``.
        private: make the repository a private one; an existing one stays as it is.
        revision: branch to commit to, made where it is missing; default main.
        update: commit to a repository that exists already.
        base_model: hub id of the base model, needed where the run's own name for it is a folder or a file.
        trust_remote_code: as of `bloblora.runs.load_run`, for the copy that is loaded.

    Raises:
        RunError: the run can't be loaded; its base model has no public name; there is no valid token, no network or no
            permission; or the repository exists and ``update`` isn't given. Nothing is committed then.
        AdapterFileError: the run's files are damaged.
    """
    if is_remote(directory):
        raise RunError(f"{directory}: is on the hub already; give a folder")
    description = open_run(directory)
    config = description.config
    if (base_model or public_base(config.model)) is None:
        raise RunError(f"the base model {quoted(config.model)} is on this machine only; give its hub id as base_model")
    with _explained(repo_id):
        validate_repo_id(repo_id)
        api = HfApi()
        api.whoami()
        if (exists := api.repo_exists(repo_id)) and not update:
            raise RunError(f"{quoted(repo_id)} exists already; give another name, or `update` to commit to it")
    with tempfile.TemporaryDirectory() as scratch:
        staging = Path(scratch)
        stage(description, staging)
        load_run(staging, trust_remote_code=trust_remote_code)
        _make_public(staging, repo_id, base_model)
        with _explained(repo_id):
            if not exists:
                api.create_repo(repo_id, private=private)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            message = f"Upload of a bloblora run, method {description.method.name}"
            commit = api.upload_folder(repo_id=repo_id, folder_path=staging, revision=revision, commit_message=message)
    return commit.commit_url


def stage(description: RunDescription, staging: Path) -> None:
    """Copy what is uploaded of a run: its own files, its method's, and a card that someone has written."""
    folder = description.folder
    for pattern in (*_PATTERNS, *description.method.files):
        for file in folder.glob(pattern):
            target = staging / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    if not is_generated(folder / CARD_FILE):
        shutil.copyfile(folder / CARD_FILE, staging / CARD_FILE)


def _make_public(staging: Path, repo_id: str, base_model: str | None) -> None:
    """Make the card, and take out where files lie on this machine."""
    card = str(model_card(staging, repo_id, base_model))
    run = read_run_file(staging)
    config = run.config
    for content, names in ((config, _PLACES), (run.training, ("imported",))):
        content |= {name: public_name(content[name]) for name in names if isinstance(content.get(name), str)}
    hub_id = base_model or public_base(config.get("model", DEFAULT_MODEL))
    if base_model is not None:
        config["model"] = base_model
        weights = {name: digest for name, digest in run.base.items() if name.endswith(".safetensors")}
        run = replace(run, base=weights)  # a copy's other files may have been written by another version
    write_run_file(staging, run)
    if entries := read_metrics(staging):
        for entry in entries:
            entry |= {name: public_name(entry[name]) for name in ("data", "out_of_scope") if name in entry}
        write_json(staging / METRICS_FILE, {"evaluations": entries})
    for file in staging.rglob(MEAN_CONFIG):
        write_json(file, read_json(file, RunError) | {"base_model_name_or_path": hub_id})
    if not (staging / CARD_FILE).exists():
        write_text(staging / CARD_FILE, card)
    open_run(staging)


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """The hub's errors as RunErrors."""
    try:
        yield
    except RunError:
        raise
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise RunError(f"{quoted(repo_id)} on {constants.ENDPOINT}: {reason(error)}") from error
