import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

from bloblora.tasks import Classification, TaskError, build_task, encode_all

from .conftest import LLAMA_LIKE

RECORDS = [
    {"text": "please refund the second payment", "label": "refund"},
    {"text": "My card", "label": "card"},
    {"text": "The trophy does not fit into the suitcase because it is too large", "label": "card"},
    {"text": "carbon dioxide", "label": "air"},
]


def tiny_classifier(config_class, **overrides):
    torch.manual_seed(1)
    sizes = dict(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=3)
    special = LLAMA_LIKE if config_class is LlamaConfig else {"intermediate_size": 64}
    config = config_class(**{**sizes, **special, "pad_token_id": 0, "initializer_range": 0.2, **overrides})
    return AutoModelForSequenceClassification.from_config(config).eval()


def test_labels_are_sorted_and_fixed(tokenizer):
    task = build_task("classification", RECORDS, tokenizer)
    assert task.labels == ("air", "card", "refund")
    assert task.columns(RECORDS[0]) == ["air", "card", "refund"]
    assert [task.encode(record, tokenizer)["label"] for record in RECORDS] == [2, 1, 1, 0]
    assert "label" not in task.encode({"text": "sand"}, tokenizer)
    assert "labels" not in task.collate(encode_all(task, [*RECORDS, {"text": "sand"}], tokenizer))


@pytest.mark.parametrize("config_class", [LlamaConfig, BertConfig])
def test_same_as_the_model_on_each_text_alone(config_class, tokenizer):
    model, task = tiny_classifier(config_class), build_task("auto", RECORDS, tokenizer)
    batch = task.collate(encode_all(task, RECORDS, tokenizer))
    assert batch["labels"].tolist() == [2, 1, 1, 0]
    with torch.no_grad():
        logits = task.logits(model, batch)
        for row, record in zip(logits, RECORDS, strict=True):
            plain = model(**tokenizer(record["text"], return_tensors="pt", return_token_type_ids=False))
            torch.testing.assert_close(row, plain.logits[0], atol=1e-5, rtol=1e-5)


def test_long_text_loses_its_end(tokenizer):
    task = build_task("classification", RECORDS, tokenizer, max_length=30)
    with pytest.warns(UserWarning, match=r"1 of 4 records .*the end of the text was cut off"):
        examples = encode_all(task, RECORDS, tokenizer)
    whole = tokenizer(RECORDS[2]["text"])["input_ids"]
    assert examples[2]["input_ids"] == whole[:30]
    assert examples[2]["truncated"] == len(whole) - 30


def test_unknown_label(tokenizer):
    task = build_task("classification", RECORDS, tokenizer)
    with pytest.raises(TaskError, match=r"field 'label': 'cash' is not one of the 3 labels \(air, card, refund\)"):
        task.encode({"text": "cash", "label": "cash"}, tokenizer)


def test_model_that_does_not_fit(tokenizer):
    task = build_task("classification", RECORDS, tokenizer)
    batch = task.collate(encode_all(task, RECORDS, tokenizer))
    with pytest.raises(TaskError, match="the task has 3 labels"):
        task.logits(tiny_classifier(LlamaConfig, num_labels=2), batch)
    with pytest.raises(TaskError, match="pad_token_id is 5; the tokenizer pads with 0"):
        task.logits(tiny_classifier(LlamaConfig, pad_token_id=5), batch)


def test_too_few_labels(tokenizer):
    with pytest.raises(TaskError, match=r"labels: \['air'\]; there must be at least 2"):
        build_task("classification", RECORDS[3:], tokenizer)
    with pytest.raises(TaskError, match="all different"):
        Classification(pad_token_id=0, labels=["a", "a"])
