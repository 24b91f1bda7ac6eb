"""Tags of words: as records, as tokens, as a likelihood, as entities, and what is measured of them."""

import math
from itertools import product

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from torch.nn import functional as F
from transformers import AutoModelForTokenClassification, BertConfig, LlamaConfig

from bloblora.adapter import BlobConfig, bayesianize
from bloblora.data import DataError, as_records, read_records
from bloblora.decision import fit_tag_sets
from bloblora.evaluation import metrics
from bloblora.prediction import TagsPrediction
from bloblora.tasks import Tags, TaskError, build_task, encode_all, task_from_dict
from bloblora.tasks.token_classification import entities_of
from tests.prediction.conftest import tiny_classifier
from tests.tasks.conftest import tokenizer, with_lora

__all__ = ["tokenizer"]

RECORDS = [
    {"tokens": ["my", "second", "payment", "was", "late"], "tags": ["O", "B-X", "I-X", "O", "O"]},
    {"tokens": ["iron"], "tags": ["B-Y"]},
]
NAMES = ("B-X", "B-Y", "I-X", "I-Y", "O")
SIZES = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


@pytest.fixture
def task(tokenizer):
    return build_task("auto", RECORDS, tokenizer)


def model(config=LlamaConfig, num_labels=4):
    torch.manual_seed(1)
    sizes = SIZES | {"pad_token_id": 0, "num_labels": num_labels, "initializer_range": 0.2, "classifier_dropout": 0.0}
    return AutoModelForTokenClassification.from_config(config(**sizes)).eval()


def prediction(probabilities):
    """Of draws' probabilities (S, n, T, K)."""
    return TagsPrediction(torch.tensor(probabilities).log().flatten(-2), len(probabilities), Tags(NAMES))


def test_words_are_read_at_their_last_sub_token_or_the_first(task, tokenizer):
    assert (task.name, task.labels) == ("token_classification", ("B-X", "B-Y", "I-X", "O"))
    assert task_from_dict(task.to_dict()) == task
    (example, _), words = encode_all(task, RECORDS, tokenizer), RECORDS[0]["tokens"]
    assert example["label"] == [3, 0, 2, 3, 3]
    first = build_task("auto", RECORDS, tokenizer, sub_token="first").encode(RECORDS[0], tokenizer)
    assert first["input_ids"] == example["input_ids"]
    spans = zip(first["places"], example["places"], words, strict=True)
    assert [tokenizer.decode(example["input_ids"][a : b + 1]).strip() for a, b, _ in spans] == words
    odd = task.encode({"tokens": ["the second", "card\tiron", "é"]}, tokenizer)["places"]
    assert odd == sorted(set(odd))


@pytest.mark.parametrize("config", [LlamaConfig, BertConfig])
def test_logits_are_the_models_own_at_these_places(task, tokenizer, config):
    examples, plain = encode_all(task, RECORDS, tokenizer), model(config)
    batch = task.collate(examples)
    assert batch["labels"][1].tolist() == [1, *[-100] * 4]
    with torch.no_grad():
        found = task.logits(plain, batch).unflatten(-1, (-1, 4))
        for example, rows in zip(examples, found, strict=True):
            alone = plain(input_ids=torch.tensor([example["input_ids"]])).logits[0, example["places"]]
            torch.testing.assert_close(rows[: len(alone)], alone, rtol=1e-4, atol=1e-5)
            assert (rows[len(alone) :] == -torch.inf).all()


def test_all_words_of_a_record_see_one_draw(task, tokenizer):
    """A causal model's first word under noise is what it is in the shorter record under the same noise."""
    noisy = with_lora(model(), "q_proj", "v_proj", task_type="TOKEN_CLS")
    bayesianize(noisy, BlobConfig(init_std=0.5))
    examples = [task.encode({"tokens": ["iron", "iron", "iron"]}, tokenizer)] * 3
    logits = task.logits(noisy.train(), task.collate(examples))
    assert not torch.allclose(logits[0], logits[1])
    first = [task.encode({"tokens": ["iron"]}, tokenizer)] * 3
    torch.manual_seed(3)
    whole = task.logits(noisy, task.collate(examples))
    torch.manual_seed(3)
    torch.testing.assert_close(task.logits(noisy, task.collate(first)), whole[:, :4], rtol=1e-4, atol=1e-5)


def test_the_likelihood_is_cross_entropy_summed_over_the_tokens():
    torch.manual_seed(0)
    likelihood, logits = Tags(NAMES), torch.randn(2, 3, 5)
    labels = torch.tensor([[0, 4, 2], [1, -100, -100]])
    logits[1, 1:] = -torch.inf
    flat = logits.flatten(-2).requires_grad_()
    expected = torch.stack([F.cross_entropy(logits[0], labels[0], reduction="sum"), -logits[1, 0].log_softmax(-1)[1]])
    torch.testing.assert_close(-likelihood.log_prob(flat, labels), expected)
    likelihood.log_prob(flat, labels).sum().backward()
    assert flat.grad.isfinite().all()
    smoothed = 0.9 * expected - 0.1 * likelihood.alike(flat, labels)
    ours = F.cross_entropy(logits[0], labels[0], reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(smoothed[0], ours)
    draws = torch.stack([flat.detach(), 2 * flat.detach()])
    mean = torch.stack([logits.softmax(-1), (2 * logits).softmax(-1)]).mean(0)
    torch.testing.assert_close(likelihood.averaged(draws, labels)[1], mean[1, 0, 1].log())
    torch.testing.assert_close(likelihood.soft_labels(likelihood.merged(draws))[0], mean[0].flatten())
    expected = (mean[0] * logits[0].log_softmax(-1)).sum()
    soft = likelihood.soft_labels(likelihood.merged(draws))
    torch.testing.assert_close(likelihood.log_prob(flat, soft)[0], expected)
    assert likelihood.guess([[0, 0, 4], [1]], [[0], [4, 4]]) == pytest.approx((math.log(2) + 2 * math.log(4)) / 2)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [  # seqeval.metrics.sequence_labeling.get_entities, whose ends are inclusive, of seqeval 1.2.2
        ("O B-X I-X O I-X", [("X", 1, 3), ("X", 4, 5)]),
        ("B-X B-X I-Y I-Y", [("X", 0, 1), ("X", 1, 2), ("Y", 2, 4)]),
        ("I-X B-X I-X", [("X", 0, 1), ("X", 1, 3)]),
        ("NOUN VERB O", []),
        ("S-X B-X E-X O S-Y", [("X", 0, 1), ("X", 1, 3), ("Y", 4, 5)]),
    ],
)
def test_entities_are_read_as_seqeval_does(tags, expected):
    assert entities_of(tags.split()) == expected


def test_an_entitys_probability_is_that_of_all_sequences_that_have_it():
    torch.manual_seed(0)
    draws = torch.randn(2, 1, 4, 5).mul(2).softmax(-1)
    found = prediction(draws.tolist())
    (entities,) = found.entities()
    assert [(e["entity"], e["start"], e["end"]) for e in entities] == entities_of(found.tags()[0])
    assert entities
    for one in entities:
        total = 0.0
        for sequence in product(range(5), repeat=4):
            if (one["entity"], one["start"], one["end"]) in entities_of([NAMES[tag] for tag in sequence]):
                total += draws[:, 0, range(4), sequence].prod(-1).mean().item()
        assert one["probability"] == pytest.approx(total, rel=1e-4)


def test_entities_in_tags_of_bioes_are_those_of_bio():
    names = ("O", "B-X", "I-X", "E-X", "S-X")
    draws = torch.randn(2, 1, 3, 5, generator=torch.Generator().manual_seed(3)).mul(2).softmax(-1)
    found = TagsPrediction(draws.log().flatten(2), 2, Tags(names))
    for one in found.entities()[0]:
        total = 0.0
        for sequence in product(range(5), repeat=3):
            if (one["entity"], one["start"], one["end"]) in entities_of([names[tag] for tag in sequence]):
                total += draws[:, 0, range(3), sequence].prod(-1).mean().item()
        assert one["probability"] == pytest.approx(total, rel=1e-4)
    sure = torch.eye(5)[[4, 1, 3]].clamp(1e-6, 1)
    found = TagsPrediction(sure.log().flatten()[None, None], 1, Tags(names))
    assert [(one["start"], one["end"]) for one in found.entities()[0]] == [(0, 1), (1, 3)]
    assert metrics(found, torch.tensor([[4, 1, 3]]))["entity_f1"] == 1
    assert metrics(found, torch.tensor([[4, 1, 2]]))["entity_f1"] == 1  # the same entities


def test_uncertainty_is_that_of_classes_token_by_token():
    draws = torch.tensor([[[[0.6, 0.1, 0.1, 0.1, 0.1], [0.2] * 5]], [[[0.2, 0.5, 0.1, 0.1, 0.1], [0.2] * 5]]])
    found = prediction(draws.tolist())
    mean = draws.mean(0)[0]
    entropy = -(mean * mean.log()).sum(-1)
    torch.testing.assert_close(found.token_entropy[0], entropy)
    aleatoric = -(draws * draws.log()).sum(-1).mean(0)[0]
    torch.testing.assert_close(found.token_mutual_information[0], 2 * (entropy - aleatoric))
    torch.testing.assert_close(found.predictive_entropy, entropy.mean()[None])
    (line,) = found.answers([["a", "b"]])
    assert line["tags"] == ["B-X", "B-X"]
    assert line["token_confidence"] == pytest.approx([0.4, 0.2])


def test_metrics_of_a_case_worked_by_hand():
    """Two right entities of three that are there; the fourth is found with a wrong end."""

    def row(*tags):
        return [[0.8 if tag == name else 0.05 for name in NAMES] for tag in tags]

    found = prediction([[row("B-X", "I-X", "O", "B-Y"), row("B-X", "O", "O", "O")]])
    found.logits[:, 1, 15:] = -torch.inf
    right = torch.tensor([[0, 2, 4, 1], [0, 2, 4, -100]])
    values = metrics(found, right)
    assert values["token_accuracy"] == pytest.approx(6 / 7)
    assert values["token_nll"] == pytest.approx(-(6 * math.log(0.8) + math.log(0.05)) / 7)
    assert values["nll"] == pytest.approx(-(6 * math.log(0.8) + math.log(0.05)) / 2)
    assert values["token_ece"] == pytest.approx(6 / 7 - 0.8)
    assert values["entity_precision"] == values["entity_recall"] == values["entity_f1"] == pytest.approx(2 / 3)
    # of B or I-X, I-X and no I-X; of B-Y, or I-Y after no Y; of B or I-X and no I-X: 0.646, 0.845, 0.8075
    first = (0.85 * 0.8 * 0.95, 0.8 + 0.05 * (1 - 0.1), 0.85 * 0.95)
    assert [one["probability"] for row in found.entities() for one in row] == pytest.approx(first, abs=1e-6)
    assert values["entity_ece"] == pytest.approx(((1 - first[0]) + abs(1 - first[1] - first[2])) / 3, abs=1e-6)
    parts = TagsPrediction(found.logits, 1, Tags(("NOUN", "VERB", "ADJ", "ADV", "O")))
    assert not {name for name in metrics(parts, right) if name.startswith("entity")}
    with pytest.raises(ValueError, match=r"targets must be \(2, 4\), in 0..4 for each token"):
        metrics(found, right.clamp_min(0))


def test_tag_sets_hold_all_tags_of_as_many_records_as_promised():
    generator = torch.Generator().manual_seed(0)

    def sample(n):
        probabilities = torch.randn(n, 3, 4, generator=generator).mul(2).softmax(-1)
        targets = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view(n, 3)
        targets[: n // 2, 2] = -100
        return probabilities, targets

    rule = fit_tag_sets(*sample(400), 0.8)
    probabilities, targets = sample(4000)
    held = rule.sets(probabilities).gather(-1, targets.clamp_min(0)[..., None])[..., 0] | (targets < 0)
    assert held.all(-1).double().mean() == pytest.approx(0.8, abs=0.05)
    assert rule.sets(probabilities).double().mean() < 0.9
    assert fit_tag_sets(torch.tensor([[[0.7, 0.3]]] * 5), torch.tensor([[1]] * 5), 0.8).threshold == pytest.approx(0.3)


def test_records_as_people_have_them(tmp_path):
    plain = {"tokens": ["the", "card"], "tags": ["O", "B-X"]}
    for row in (
        {"tokens": plain["tokens"], "ner_tags": plain["tags"]},
        {"words": plain["tokens"], "labels": plain["tags"]},
        {"tokens": '["the", "card"]', "tags": '["O", "B-X"]'},
    ):
        assert as_records([row]) == [plain]
    names = ClassLabel(names=["O", "B-X"])
    features = Features({"tokens": Sequence(Value("string")), "ner_tags": Sequence(names)})
    rows = Dataset.from_dict({"tokens": [plain["tokens"]], "ner_tags": [[0, 1]]}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "folder")
    (tmp_path / "rows.conll").write_text("-DOCSTART- -X- O O\n\nthe DT O\ncard NN B-X\n\n\nthe DT O\ncard NN B-X")
    for source in ("rows.parquet", "folder"):
        assert read_records(tmp_path / source) == [plain]
    assert as_records(rows) == [plain]
    assert read_records(tmp_path / "rows.conll") == [plain, plain]
    for wrong, message in (
        ({"tokens": []}, "field 'tokens': \\[\\] must be a list of at least one"),
        ({"tokens": ["a", " "]}, "field 'tokens', item 1: ' ' must be a text"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "must be a list of texts, one for each of the 2 tokens"),
    ):
        with pytest.raises(DataError, match=message):
            as_records([wrong])
    with pytest.raises(DataError, match="field 'tags': missing"):
        as_records([{"tokens": ["a"]}], require_labels=True)


def test_what_cannot_be_read_is_said(task, tokenizer):
    short = build_task("auto", RECORDS, tokenizer, max_length=3)
    with pytest.raises(TaskError, match=r"field 'tokens': 5 of them are [0-9]+ tokens of the model.*max_length=3"):
        short.encode(RECORDS[0], tokenizer)
    with pytest.raises(TaskError, match="'B-Z' is not one of 4 labels"):
        task.encode({"tokens": ["a"], "tags": ["B-Z"]}, tokenizer)
    with pytest.raises(TaskError, match="load a token classification model with num_labels=4"):
        task.logits(tiny_classifier(4), task.collate(encode_all(task, RECORDS, tokenizer)))
    with pytest.raises(TaskError, match="all are 'O'; there must be at least 2 labels"):
        type(task).check([{"tokens": ["a"], "tags": ["O"]}])
