"""What README's script leaves, with a tiny base model."""

import pytest

from bloblora import data, find_posterior, load, models, predict
from tests.docs.blocks import blocks_of


@pytest.mark.filterwarnings("ignore")
def test_the_script_trains_the_posterior_and_makes_the_head(reader_of):
    reader = reader_of("README.md")
    reader.run(next(block for block in blocks_of("README.md") if block.language == "python"), all_steps=True)
    names, records = reader.namespace, data.support_desk("train")
    found = predict(names["model"], records, 0, tokenizer=names["tokenizer"])
    right = [names["labels"][i] == record["label"] for i, record in zip(found.labels, records, strict=True)]
    # Random layers of width 32 tell little of 24 intents; a guess is right once in 24, with a standard error of 0.012.
    assert sum(right) / len(right) > 0.09
    posterior = find_posterior(names["model"])
    assert posterior.summary()["median_std"] > 2 * posterior.start_std()
    assert names["answer"].mutual_information[0] > 0
    fresh = models.load_model("smollm2-135m", num_labels=len(names["labels"]))
    kept = predict(load(fresh, "adapter"), records, 0, tokenizer=names["tokenizer"])
    assert kept.log_probs.sub(found.log_probs).abs().max() < 1e-4
