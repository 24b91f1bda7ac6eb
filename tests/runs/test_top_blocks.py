"""Adapters in the top blocks, trained from what the blocks below made once."""

import pytest
import torch
from peft.tuners.lora import LoraLayer

from bloblora import runs
from tests.tiny_base import QUESTIONS, queries, write_jsonl

OPTIONS = {"ensemble": {"members": 2}, "laplace-lora": {"subset_of_weights": "last_layer"}}


@pytest.fixture
def config(base, tmp_path):
    def build(records, **options):
        return runs.RunConfig.of(
            data=str(write_jsonl(tmp_path / "data.jsonl", records)),
            output=str(tmp_path / "run"),
            model=str(base),
            steps=4,
            batch_size=2,
            r=2,
            top_blocks=1,
            **options,
        )

    return build


@pytest.mark.parametrize("records", [queries(), QUESTIONS], ids=["texts", "questions"])
@pytest.mark.parametrize("method", ["blob", "laplace-lora", "ensemble"])
def test_a_run_from_the_cache_is_the_run_without_it(records, method, config, tmp_path):
    plain = config(records, method=method, **OPTIONS.get(method, {}))
    cache = tmp_path / "cache"
    cached = plain.with_options(output=str(tmp_path / "cached"), trunk_cache=str(cache))
    expected, found = (runs.train(c, progress=False) for c in (plain, cached))
    adapted = [name for name, module in found.model.named_modules() if isinstance(module, LoraLayer)]
    assert adapted
    assert all(".layers.1." in name for name in adapted)
    assert len([*cache.glob("*.npy")]) == 1
    inputs = [{k: v for k, v in record.items() if k not in ("label", "answer")} for record in records]
    for run in (found, runs.load_run(cached.output)):
        torch.testing.assert_close(
            run.predict(inputs, 3).draw_probabilities, expected.predict(inputs, 3).draw_probabilities, rtol=0, atol=1e-4
        )


def test_clear_errors(config, tmp_path):
    with pytest.raises(runs.RunError, match="trunk_cache needs top_blocks"):
        config(queries()).with_options(top_blocks=None, trunk_cache=str(tmp_path))
    with pytest.raises(runs.RunError, match="a method that trains on all records"):
        config(queries(), method="laplace-lora", holdout=0.5, validation=0, trunk_cache=str(tmp_path))
    with pytest.raises(runs.RunError, match="top_blocks must be at least 1, got 0"):
        config(queries()).with_options(top_blocks=0)
    with pytest.raises(runs.RunError, match="top_blocks must be at most the model's 2 blocks, got 3"):
        runs.train(config(queries()).with_options(top_blocks=3), progress=False)
