"""Runs in lm-polygraph: its own estimators against our scores of the mean, and ours in its hands."""

import pytest
import torch

pytest.importorskip("lm_polygraph")

from lm_polygraph import estimate_uncertainty
from lm_polygraph.defaults.register_default_stat_calculators import register_default_stat_calculators
from lm_polygraph.estimators import MaximumSequenceProbability
from lm_polygraph.utils.builder_enviroment_stat_calculator import BuilderEnvironmentStatCalculator
from lm_polygraph.utils.dataset import Dataset
from lm_polygraph.utils.manager import UEManager

from bloblora import find_posterior, runs
from bloblora.generation import score
from bloblora.integrations.lm_polygraph import BlobEstimator, white_box
from tests.generation.conftest import RECORDS, SETTINGS
from tests.tiny_base import queries, write_jsonl

PROMPTS = [record["prompt"] for record in RECORDS]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("polygraph")
    data = write_jsonl(folder / "train.jsonl", RECORDS)
    config = runs.RunConfig.of(
        data=str(data), model=str(base), output=str(folder / "run"), **SETTINGS | {"steps": 20}, init_std=0.2
    )
    return runs.train(config, progress=False)


def managed(run, *estimators):
    """lm-polygraph's own program for both prompts: its texts, and the uncertainties of each estimator."""
    model = white_box(run)
    manager = UEManager(
        Dataset(PROMPTS, [""] * 2, batch_size=2),
        model,
        [*estimators],
        available_stat_calculators=register_default_stat_calculators("Whitebox"),
        builder_env_stat_calc=BuilderEnvironmentStatCalculator(model),
        generation_metrics=[],
        ue_metrics=[],
        processors=[],
        ignore_exceptions=False,
        verbose=False,
        max_new_tokens=8,
    )
    manager()
    return manager.stats["greedy_tokens"], [manager.estimations["sequence", str(one)] for one in estimators]


@torch.no_grad()
def allowed_log_prob(run, prompt, response):
    """Under the mean, among what lm-polygraph lets a model write: no end before the third token."""
    with find_posterior(run.model).mean():
        logits = run.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
    logits[:2, run.tokenizer.eos_token_id] = -torch.inf
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum().item()


def test_its_uncertainties_are_our_scores(run):
    """Its own estimator is of the posterior mean, and ours of the draws."""
    names = ("sequence_log_probability", "tokur_epistemic")
    tokens, (its_own, *ours) = managed(run, MaximumSequenceProbability(), *(BlobEstimator(run, n, 3) for n in names))
    prompts = [run.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    by_hand = [-allowed_log_prob(run, *pair) for pair in zip(prompts, tokens, strict=True)]
    assert its_own == pytest.approx(by_hand, abs=1e-3)
    drawn = score(run.model, prompts, tokens, 3, sampler=run.sampler)
    assert ours[0] == pytest.approx((-drawn.sequence_log_probability).tolist(), abs=1e-3)
    assert ours[1] == pytest.approx(drawn.tokur_epistemic.tolist(), abs=1e-3)
    assert min(ours[1]) > 0  # the draws disagree
    alone = estimate_uncertainty(white_box(run, 8), BlobEstimator(run, names[1], 3), PROMPTS[0])
    assert alone.uncertainty == pytest.approx(ours[1][0], abs=1e-3)


def test_what_it_cannot_take(run, base, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", queries())
    config = runs.RunConfig.of(data=str(data), model=str(base), output=str(tmp_path / "run"), steps=1, batch_size=2)
    labels = runs.train(config, progress=False)
    with pytest.raises(runs.RunError, match="the run's task is classification"):
        white_box(labels)
    with pytest.raises(runs.RunError, match=r"name must be one of log_probability, .* got 'agreement'"):
        BlobEstimator(run, "agreement")
    with pytest.raises(runs.RunError, match="samples must be 0"):
        BlobEstimator(run, num_samples=-1)
