"""A run on the Hugging Face hub: its card, and the upload."""

from transformers.utils import logging

from ...hub import push as push_run
from ...hub import write_card


def card(directory: str, to: str | None = None, base_model: str | None = None) -> None:
    """Write a model card, the README.md of a run's folder: use, data, settings, metrics, promises, limits.

    Metrics are those that `bloblora evaluate` has written to metrics.json in the folder, or to metrics-NAME.json for
    data called NAME, and reliability.png or reliability-NAME.png beside them. What isn't there is left out.

    Examples:
      bloblora evaluate runs/desk --data support_desk:test --output runs/desk/metrics-test.json \\
        --diagram runs/desk/reliability-test.png
      bloblora card runs/desk

    Args:
        directory: folder of the run.
        to: name on the hub, `user/name`, for the card's examples.
        base_model: hub id of the base model, where the run was trained from a folder or a file.
    """
    print(f"written to {write_card(directory, to, base_model)}")


def push(
    directory: str,
    to: str,
    revision: str | None = None,
    base_model: str | None = None,
    private: bool = False,
    update: bool = False,
) -> None:
    """Upload a run to the Hugging Face hub, with its model card; `hub:user/name` is then as good as its folder.

    Only what the run needs goes up, no checkpoints and no training records, after a copy of it has been loaded. A
    README.md that someone has written goes with it; else a card is made as by `bloblora card`. The token is that of
    `hf auth login`, or HF_TOKEN.

    Examples:
      bloblora push runs/desk --to user/desk --private
      bloblora predict hub:user/desk --input queries.jsonl

    Args:
        directory: folder of the run.
        to: name on the hub, `user/name`.
        revision: branch to commit to, made where it is missing; default main.
        base_model: hub id of the base model, needed where the run was trained from a folder or a file.
        private: make a private repository.
        update: commit to a repository that exists already.
    """
    logging.disable_progress_bar()
    address = push_run(directory, to, private=private, revision=revision, update=update, base_model=base_model)
    print(f"uploaded: {address}; next: bloblora predict hub:{to}{f'@{revision}' if revision else ''} --input FILE")
