"""Trained tiny runs, and a way to call the command line in this process."""

from types import SimpleNamespace

import pytest

from bloblora.cli import main
from tests.tiny_base import QUESTIONS, queries, save_base, write_jsonl

SETTINGS = ("--steps", "2", "--batch-size", "2", "--r", "2", "--learning-rate", "0.01")
LEARNT = ("--std-learning-rate", "0.5")  # so that Ω leaves its start, and no warning stands in standard error
HEAD = ("--factors", "none", "--temperature-folds", "2")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    outside = [{"text": "what is the weather"}, {"text": "plants take light"}, {"text": "the trophy is too large"}]
    return SimpleNamespace(
        base=str(save_base(folder / "base")),
        texts=str(write_jsonl(folder / "texts.jsonl", queries())),
        questions=str(write_jsonl(folder / "questions.jsonl", QUESTIONS)),
        outside=str(write_jsonl(folder / "outside.jsonl", outside)),
        unknown=str(write_jsonl(folder / "unknown.jsonl", [*queries(), {"text": "x", "label": "other"}])),
        bad=str(write_jsonl(folder / "bad.jsonl", [*queries(), {"text": ""}])),
    )


def _trained(files, folder, data, *options):
    main(["train", "--data", data, "--model", files.base, "--output", str(folder), *SETTINGS, *LEARNT, *options])
    return str(folder)


@pytest.fixture(scope="session")
def run(files, tmp_path_factory):
    """With a Gaussian head, as more records have it by default, and the temperature that it needs."""
    return _trained(files, tmp_path_factory.mktemp("runs") / "texts", files.texts, *HEAD)


@pytest.fixture(scope="session")
def choice_run(files, tmp_path_factory):
    return _trained(files, tmp_path_factory.mktemp("runs") / "questions", files.questions)


@pytest.fixture
def call(capsys):
    """Call a command; its exit status, standard output and standard error."""

    def call(*arguments):
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as exit_:
            status = exit_.code
        captured = capsys.readouterr()
        return status or 0, captured.out, captured.err

    return call
