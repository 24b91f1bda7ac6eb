"""Preferences as records, as trees, and as a likelihood."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BertConfig

from bloblora.adapter import BlobConfig, bayesianize
from bloblora.data import DataError, as_records, read_records
from bloblora.prediction import RewardPrediction
from bloblora.tasks import BradleyTerry, Reward, TaskError, build_task, encode_all, task_from_dict
from tests.prediction.conftest import tiny_classifier
from tests.tasks.conftest import tokenizer, with_lora

__all__ = ["tokenizer"]

PAIRS = [
    {"prompt": "my card", "chosen": "the refund", "rejected": "gas and the air"},
    {"chosen": "air", "rejected": "card twice"},
]


@pytest.fixture
def task(tokenizer):
    return build_task("auto", PAIRS, tokenizer)


def model():
    return tiny_classifier(num_labels=1)


def test_the_order_says_nothing_of_what_was_chosen(task, tokenizer):
    assert task.name == "reward"
    assert task_from_dict(task.to_dict()) == task
    assert [example["label"] for example in encode_all(task, PAIRS, tokenizer)] == [1, 0]
    assert task.columns(PAIRS[0]) == ["gas and the air", "the refund"]
    swapped = {"prompt": "my card", "chosen": "gas and the air", "rejected": "the refund"}
    here, there = task.encode(PAIRS[0], tokenizer), task.encode(swapped, tokenizer)
    assert {**here, "label": 0} == there


def test_the_likelihood_is_that_of_bradley_and_terry():
    rewards = torch.tensor([[0.3, -1.2], [2.0, 0.5]])
    found = BradleyTerry().log_prob(rewards, torch.tensor([0, 1]))
    torch.testing.assert_close(found, F.logsigmoid(torch.tensor([1.5, -1.5])))
    prediction = RewardPrediction(rewards[None], 0)
    torch.testing.assert_close(prediction.probabilities[:, 0], torch.sigmoid(torch.tensor([1.5, 1.5])))
    torch.testing.assert_close(prediction.rewards, torch.tensor([[0.75, -0.75], [0.75, -0.75]]))


def test_a_common_shift_of_the_draws_is_no_doubt():
    torch.manual_seed(0)
    logits = torch.randn(6, 5, 3)
    logits[:, 4, 2] = -torch.inf
    here = RewardPrediction(logits, 6)
    there = RewardPrediction(logits + torch.randn(6, 5, 1), 6)
    torch.testing.assert_close(here.lower_bounds, there.lower_bounds, equal_nan=True, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(here.mutual_information, there.mutual_information, rtol=1e-3, atol=1e-5)
    assert here.best[4] < 2


def test_a_reward_is_that_of_the_text_alone(task, tokenizer):
    batch = task.collate(encode_all(task, PAIRS, tokenizer))
    plain = model()
    with torch.no_grad():
        found = task.logits(plain, batch)
        for record, row in zip(PAIRS, found, strict=True):
            for text, reward in zip(task.columns(record), row, strict=True):
                words = f"{record['prompt']} {text}" if "prompt" in record else text
                ids = tokenizer(words + tokenizer.eos_token, return_tensors="pt")["input_ids"]
                torch.testing.assert_close(plain(input_ids=ids).logits[0, 0], reward, rtol=1e-4, atol=1e-5)


def test_both_responses_see_one_draw_in_training(task, tokenizer):
    """Equal texts have equal rewards under noise, so that it is the difference under one draw that is learned."""
    noisy = with_lora(model(), "q_proj", "v_proj", task_type="SEQ_CLS")
    bayesianize(noisy, BlobConfig(init_std=0.5))
    for name, weight in noisy.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight)
    examples = [task.encode({"prompt": "my card", "responses": ["air", "air"]}, tokenizer)] * 2
    rewards = task.logits(noisy.train(), task.collate(examples))
    torch.testing.assert_close(rewards[:, 0], rewards[:, 1])
    assert not torch.allclose(rewards[0], rewards[1])


def test_a_margin_is_taken_off_the_difference_in_training_alone(tokenizer):
    """TRL's loss, −log σ(r_chosen − r_rejected − margin), and plain Bradley and Terry where nothing is trained."""
    pairs = as_records([PAIRS[0] | {"margin": 1.5}, PAIRS[1] | {"margin": ""}, PAIRS[0] | {"margin": "0.5"}])
    task = build_task("auto", pairs, tokenizer)
    batch, plain = task.collate(encode_all(task, pairs, tokenizer)), model()
    labels, rows = batch["labels"], torch.arange(3)
    with torch.no_grad():
        rewards = task.logits(plain, batch)
        difference = rewards[rows, labels] - rewards[rows, 1 - labels]
        torch.testing.assert_close(BradleyTerry().log_prob(rewards, labels), F.logsigmoid(difference))
        found = BradleyTerry().log_prob(task.logits(plain.train(), batch), labels)
    torch.testing.assert_close(found, F.logsigmoid(difference - torch.tensor([1.5, 0.0, 0.5])))
    assert "margins" not in task.collate(encode_all(task, PAIRS, tokenizer))


def test_a_tie_and_scores_the_other_way_round_are_no_preference():
    for tie, message in (
        ({"tie": True}, r"^row 1: field 'tie': True must be false: in a tie none is preferred; leave the record out"),
        ({"score_chosen": 4, "score_rejected": 4.0}, "^row 1: field 'score_chosen': 4 must be above .*: in a tie none"),
        (
            {"score_chosen": 3, "score_rejected": "10"},
            "^row 1: field 'score_chosen': 3 must be above .*: by these scores",
        ),
    ):
        with pytest.raises(DataError, match=message):
            as_records([PAIRS[0] | tie], require_labels=True)
        assert len(as_records([PAIRS[0] | tie])) == 1
    others = [{"tie": False, "score_chosen": "10", "score_rejected": 4.5}, {"score_chosen": None}]
    assert len(as_records([PAIRS[0] | other for other in others], require_labels=True)) == 2


def test_chats_and_long_prompts(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
    asked, said = {"role": "user", "content": "my card"}, {"role": "assistant", "content": "the refund"}
    other = {"role": "assistant", "content": "air"}
    task = Reward(pad_token_id=0, max_length=None)
    ways = (
        {"prompt": [asked], "chosen": [said], "rejected": [other]},
        {"prompt": "my card", "chosen": [said], "rejected": [other]},
        {"prompt": "ignored", "chosen": [asked, said], "rejected": [asked, other]},
        {"prompt": [asked], "chosen": "the refund", "rejected": "air"},
    )
    found = [task.encode(as_records(record)[0], tokenizer) for record in ways]
    assert [one["branches"][one["label"]] for one in found] == [found[0]["branches"][found[0]["label"]]] * 4
    assert all(one["prefix"] == found[0]["prefix"] for one in found)
    short = Reward(pad_token_id=0, max_length=6).encode({"prompt": "my card the gas", "responses": ["air"]}, tokenizer)
    assert len(short["prefix"]) + len(short["branches"][0]) <= 6
    assert short["truncated"] > 0


def test_problems_name_the_field(tmp_path):
    for wrong, message in (
        ({"chosen": "a"}, "field 'rejected': missing"),
        ({"chosen": "a", "rejected": "a"}, "field 'rejected': the same as 'chosen'"),
        ({"chosen": "a", "rejected": " "}, "field 'rejected': ' ' must be a text"),
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": "b"}, "last message's role is 'user'"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "field 'prompt': ' ' must be a text"),
        ({"chosen": "a", "rejected": "b", "margin": -1}, "field 'margin': -1 must be a finite number of at least 0"),
        ({"chosen": "a", "rejected": "b", "margin": "much"}, "field 'margin': 'much' must be a finite number"),
        ({"responses": []}, "field 'responses': .* must be a list of at least one text"),
        ({"responses": ["a", 3]}, "field 'responses', item 1: 3 must be a text"),
    ):
        with pytest.raises(DataError, match=message):
            as_records([wrong])
    (tmp_path / "data.csv").write_text("Prompt,Chosen,Rejected\nwhat,a,b\n")
    assert read_records(tmp_path / "data.csv") == [{"prompt": "what", "chosen": "a", "rejected": "b"}]


def test_a_model_without_such_a_head_is_named(task, tokenizer):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=400)
    encoder = AutoModelForSequenceClassification.from_config(BertConfig(**sizes, num_labels=1))
    batch = task.collate(encode_all(task, PAIRS, tokenizer))
    with pytest.raises(TaskError, match="its head gives 3 numbers; load it with num_labels=1"):
        task.logits(tiny_classifier(), batch)
    with pytest.raises(TaskError, match="no head named 'score'; rewards are read at the end of each response"):
        task.logits(encoder, batch)
