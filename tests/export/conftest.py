"""Tiny trained runs of every method, made once."""

import pytest

from bloblora import runs
from bloblora.runs.config import presets
from tests.conftest import OVER_A
from tests.tasks.conftest import tiny_causal, train_tokenizer
from tests.tiny_base import QUESTIONS, queries, save_base, write_jsonl

OPTIONS = {"ensemble": {"members": 2}, "mixture": {"members": 2, "init_std": 0.16}, "distilled": {"distill_steps": 2}}
NOISY = {"blob": {"init_std": 0.16, **OVER_A}, "scalabl": {"init_std": 0.49}, "mc-dropout": {"lora_dropout": 0.3}}


@pytest.fixture(scope="session")
def tied_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    tiny_causal(tie_word_embeddings=True).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """The folder of a run of a method, on questions or on texts."""
    folder = tmp_path_factory.mktemp("export")
    base = save_base(folder / "base")
    data = {
        "questions": write_jsonl(folder / "questions.jsonl", QUESTIONS * 2),
        "texts": write_jsonl(folder / "texts.jsonl", queries()),
    }

    def run_of(method, kind="questions", **options):
        name = "-".join([method, kind, *map(str, options.values())]).replace("/", "_")
        if not (folder / name).is_dir():
            settings = {"steps": 4, "batch_size": 2, "r": 2, "learning_rate": 0.05, "model": str(base)}
            settings |= {"preset" if method in presets() else "method": method}
            settings |= OPTIONS.get(method, {}) | NOISY.get(method, {}) | options
            runs.train(
                runs.RunConfig.of(data=str(data[kind]), output=str(folder / name), **settings),
                progress=False,
            )
        return folder / name

    return run_of
