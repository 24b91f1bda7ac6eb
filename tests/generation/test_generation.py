"""The measures of a generation against numbers computed by hand."""

import math

import pytest
import torch

from bloblora.generation import Generation


def generation(**changes) -> Generation:
    """Two answers, of 2 and 1 tokens, under 3 draws."""
    probs = torch.tensor([[[0.5, 0.5], [0.25, 1]], [[0.25, 0.5], [0.5, 1]], [[0.75, 0.5], [0.75, 1]]])
    fields = {
        "texts": ["The sun", "iron"],
        "draw_texts": [["the sun.", "Sun", "moon"], ["iron", "iron", "iron"]],
        "tokens": torch.tensor([[5, 2], [2, 0]]),
        "draw_tokens": torch.zeros(3, 2, 2, dtype=torch.long),
        "mask": torch.tensor([[True, True], [True, False]]),
        "draw_log_probs": probs.log(),
        "entropies": torch.tensor([[0.9, 0.5], [0.7, 0]]),
        "expected_entropies": torch.tensor([[0.6, 0.4], [0.7, 0]]),
        "ranks": torch.tensor([[1, 3], [2, 0]]),
        "num_samples": 3,
    }
    return Generation(**fields | changes)


def test_by_hand():
    scores = generation().scores()
    expected = {
        # p̄ = (0.5, 0.5) and 0.5
        "log_probability": [math.log(0.5), math.log(0.5)],
        "sequence_log_probability": [2 * math.log(0.5), math.log(0.5)],
        "mixture_log_probability": [math.log((1 / 4 + 1 / 8 + 3 / 8) / 3), math.log(0.5)],
        "predictive_entropy": [0.7, 0.7],
        "expected_entropy": [0.5, 0.7],
        "mutual_information": [0.3, 0.0],  # of 3 draws: 1.5 times the difference
        # log ¼, log ⅛ and log ⅜: squares of deviations from their mean over 2
        "log_probability_variance": [
            sum(
                (math.log(p) - (math.log(1 / 4) + math.log(1 / 8) + math.log(3 / 8)) / 3) ** 2
                for p in (1 / 4, 1 / 8, 3 / 8)
            )
            / 2,
            sum(
                (math.log(p) - (math.log(1 / 4) + math.log(1 / 2) + math.log(3 / 4)) / 3) ** 2
                for p in (1 / 4, 1 / 2, 3 / 4)
            )
            / 2,
        ],
        "tokur_total": [1.4, 0.7],
        "tokur_aleatoric": [1.0, 0.7],
        "tokur_epistemic": [0.4, 0.0],
        "agreement": [1 / 3, 1],
        "self_consistency": [2 / 3, 1],
        "draw_semantic_entropy": [math.log(3) - 2 / 3 * math.log(2), 0],
    }
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        assert scores[name].tolist() == pytest.approx(values, abs=1e-6), name


def test_a_mixture_of_whole_texts_is_no_product_of_means():
    # ½(0.81 + 0.01) of the mixture, and 0.5 · 0.5 token by token
    two = generation(draw_log_probs=torch.tensor([[[0.9, 0.9], [1, 1]], [[0.1, 0.1], [1, 1]]]).log())
    assert two.mixture_log_probability[0].exp().item() == pytest.approx(0.41)
    assert two.sequence_log_probability[0].exp().item() == pytest.approx(0.25)


def test_answers_in_their_order():
    assert generation().ranked_answers == [["The sun", "moon"], ["iron"]]
    four = generation(texts=["a1", "iron"], draw_texts=[["b", "c", "C.", "a1", "d"], ["rust"]])
    assert four.ranked_answers == [["a1", "c", "b", "d"], ["iron", "rust"]]


def test_one_draw_is_certain_of_itself():
    whole = generation()
    one = generation(draw_texts=[["sun"], ["iron"]], draw_log_probs=whole.draw_log_probs[:1], num_samples=0)
    assert one.agreement.tolist() == [1, 1]
    assert one.draw_semantic_entropy.tolist() == [0, 0]
    assert one.log_probability_variance.tolist() == [0, 0]
    assert one.log_probability.tolist() == pytest.approx([math.log(0.5), math.log(0.25)])


def test_a_given_relation_decides():
    found = generation(agree=lambda first, second: "moon" not in (first, second) or True)
    assert found.agreement.tolist() == [1, 1]
    assert found.draw_semantic_entropy.tolist() == [0, 0]


def test_sampled_answers_by_hand():
    """Clusters {a, A} and {b}: with length-normalized probabilities ½, ¼ and ¼ their shares are ¾ and ¼."""
    log_probs = torch.tensor([[0.5, 1], [0.25, 1], [0.25, 1]]).log()
    found = generation(sampled_texts=[["a b", "A b.", "c"], ["d", "d", "d"]], sampled_log_probs=log_probs)
    assert found.semantic_entropy.tolist() == pytest.approx([-0.75 * math.log(0.75) - 0.25 * math.log(0.25), 0])
    counted = -2 / 3 * math.log(2 / 3) - 1 / 3 * math.log(1 / 3)
    assert found.discrete_semantic_entropy.tolist() == pytest.approx([counted, 0])
    scored = generation(p_true=torch.tensor([0.25, 0.75])).scores()
    assert scored["p_true"].tolist() == [0.25, 0.75]
    assert not {"semantic_entropy", "discrete_semantic_entropy"} & scored.keys()
    with pytest.raises(ValueError, match="answers: none were sampled"):
        generation().semantic_entropy  # noqa: B018


def test_answers_of_draws_that_were_not_asked_for():
    none = generation(draw_texts=[[], []], draw_tokens=torch.zeros(0, 2, 0, dtype=torch.long))
    assert none.ranked_answers == [["The sun"], ["iron"]]
    assert not {"agreement", "self_consistency", "draw_semantic_entropy"} & none.scores().keys()
    with pytest.raises(ValueError, match="ask with draws=True"):
        none.agreement  # noqa: B018
