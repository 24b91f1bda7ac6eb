"""The project's own studies can be read, and every run in them has options that its method takes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from bloblora.studies import EvalSet, read_study
from bloblora.studies.job import run as run_job
from tests.tasks.conftest import train_tokenizer
from tests.tiny_base import QUESTIONS, queries, save_base, write_jsonl

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"


BLANKS = [{"question": "The _ is lost.", "choices": ["card", "key"], "answer": i} for i in (0, 1, 0, 1)]


def tiny_roberta(folder):
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = RobertaConfig(vocab_size=400, max_position_embeddings=70, pad_token_id=0, **sizes)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_committed_study_is_whole(file, tmp_path):
    study = read_study(file)
    jobs = study.jobs(tmp_path)
    assert len(jobs) == len(study.seeds) * len(study.models) * len(study.datasets) * len(study.methods)
    assert f"bloblora compare {file.relative_to(STUDIES.parents[1])}" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "make_base", "records"),
    [("paper_llama2_7b", save_base, QUESTIONS), ("paper_roberta", tiny_roberta, queries())],
)
def test_the_papers_tables_on_a_tiny_model_of_their_architecture(name, make_base, records, tmp_path):
    """Two steps of each method, and of `blob` on each data set; all but model, data and steps is as the file has it."""
    study = read_study(STUDIES / f"{name}.yaml")
    base = make_base(tmp_path / "base")
    jobs = [job for job in study.jobs(tmp_path / "runs") if job.config.seed == 1]
    jobs = [job for job in jobs if job.dataset in ("arc_easy", "rte") or job.label == "blob"]
    assert {job.label for job in jobs} == set(study.methods)
    assert {job.dataset for job in jobs} == set(study.datasets)
    for job in jobs:
        data = str(write_jsonl(tmp_path / "data.jsonl", BLANKS if job.config.task["name"] == "blank" else records))
        config = job.config.with_options(model=str(base), data=data, steps=2, dtype="float32")
        small = replace(job, config=config, sets={"test": EvalSet(data)}, samples=(0, 2))
        result = run_job(small, tmp_path / "results", progress=False)
        assert set(result.metrics["test"]) == {"0", "2"}
