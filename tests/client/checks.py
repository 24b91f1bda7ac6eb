"""What a server's answers must be, whichever it is."""

import torch

from bloblora.adapter import find_posterior
from bloblora.client import DrawClient
from tests.client.conftest import SAMPLES, SEED

# float32 on both sides; the server sees a choice alone, `predict` all choices of a question in one row, and sums differ
TOLERANCE = {"rtol": 0, "atol": 2e-5}


def check_choices(case, url, **options):
    """The averaged probabilities, and each draw's, are those of `predict`."""
    expected = case.run.predict(case.records, SAMPLES, SEED)
    found = DrawClient(case.folder, url, **options).predict(case.records)
    assert found.num_samples == SAMPLES
    torch.testing.assert_close(found.draw_probabilities, expected.draw_probabilities, **TOLERANCE)
    torch.testing.assert_close(found.probabilities, expected.probabilities, **TOLERANCE)
    torch.testing.assert_close(found.mutual_information, expected.mutual_information, rtol=0, atol=1e-4)
    assert expected.draw_probabilities.std(0).max() > 0.01  # draws that say the same would hide a wrong one


def check_texts(case, url):
    """Each draw's text is that of `generate`, and its log-probabilities are those of transformers' own."""
    found = DrawClient(case.folder, url).generate(case.records, max_new_tokens=6)
    expected = case.run.generate(case.records, SAMPLES, SEED, max_new_tokens=6, do_sample=False, draws=True)
    assert [whole(texts) for texts in found.texts] == [whole(texts) for texts in expected.draw_texts]
    generator = torch.Generator().manual_seed(SEED)
    for draw in range(SAMPLES):
        with find_posterior(case.run.model).draw(generator):
            for row, record in zip(found.token_log_probs, case.records, strict=True):
                torch.testing.assert_close(torch.tensor(row[draw]), greedy(case.run, record), rtol=0, atol=1e-4)


def whole(texts):
    """Without bytes that are no character: whether the last of them are shown is the server's to choose."""
    return [text.replace("\ufffd", "") for text in texts]


def greedy(run, record):
    """Log-probabilities of the tokens that the model writes as it is."""
    prompt = torch.tensor([run.task.encode({"prompt": record["prompt"]}, run.tokenizer)["prompt"]])
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    written = run.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    return run.model.compute_transition_scores(written.sequences, written.scores, normalize_logits=True)[0]
