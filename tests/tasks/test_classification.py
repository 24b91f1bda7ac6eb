import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

from bloblora.tasks import Classification, TaskError, build_task, encode_all

from .conftest import LLAMA_LIKE, train_tokenizer

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
    model, task = tiny_classifier(config_class), build_task("auto", RECORDS, tokenizer, template="{text}")
    batch = task.collate(encode_all(task, RECORDS, tokenizer))
    assert batch["labels"].tolist() == [2, 1, 1, 0]
    with torch.no_grad():
        logits = task.logits(model, batch)
        for row, record in zip(logits, RECORDS, strict=True):
            plain = model(**tokenizer(record["text"], return_tensors="pt", return_token_type_ids=False))
            torch.testing.assert_close(row, plain.logits[0], atol=1e-5, rtol=1e-5)


def test_long_text_loses_its_end(tokenizer, caplog):
    task = build_task("classification", RECORDS, tokenizer, max_length=30, template="{text}")
    examples = encode_all(task, RECORDS, tokenizer)
    whole = tokenizer(RECORDS[2]["text"])["input_ids"]
    assert caplog.messages == [
        "1 of 4 records have more than max_length=30 tokens: the end of the text was cut off; "
        f"the longest has {len(whole)}"
    ]
    assert examples[2]["input_ids"] == whole[:30]
    assert examples[2]["truncated"] == len(whole) - 30


def test_of_a_template_the_text_alone_is_cut(tokenizer):
    texts = {"text": "a " * 20 + "{suitcase}", "text_pair": "the trophy " * 40}
    template = "First: {text} Second: {text_pair} Same:"
    whole = tokenizer(template.format(**texts))["input_ids"]
    room = len(tokenizer(template.format(text=texts["text"], text_pair="the trophy"))["input_ids"])
    task = build_task("classification", RECORDS, tokenizer, template=template, max_length=room)
    example = task.encode(texts, tokenizer)
    assert room - 4 <= len(example["input_ids"]) <= room
    assert example["truncated"] == len(whole) - len(example["input_ids"])
    read = tokenizer.decode(example["input_ids"])
    assert read.startswith(f"First: {texts['text']} Second: the trophy")
    assert read.endswith(" Same:")
    with pytest.raises(TaskError, match="max_length: 8 tokens are left for the prompt, too few for a text_pair"):
        build_task("classification", RECORDS, tokenizer, template=template, max_length=8).encode(texts, tokenizer)


def test_classes_of_single_texts_are_asked_for_in_one_word(tokenizer):
    task = build_task("classification", RECORDS, tokenizer)
    read = tokenizer.decode(task.encode(RECORDS[1], tokenizer)["input_ids"])
    assert read == 'This sentence: "My card" means in one word: "'
    assert task.template in task.head_note
    pairs = build_task("classification", [PAIR, *RECORDS], tokenizer)
    assert pairs.template == "{text}"
    assert pairs.head_note is None
    encoder = train_tokenizer()
    encoder.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert build_task("classification", RECORDS, encoder).template == "{text}"
    values = [{"text": "a", "value": 1}, {"text": "b", "value": 2}]
    regression = build_task("regression", values, tokenizer, template="How good is {text}?")
    assert "'How good is {text}?'" in regression.head_note
    assert "noise" in regression.head_note


@pytest.mark.parametrize(
    ("template", "record", "error"),
    [
        ("Say:", RECORDS[0], r"template: 'Say:'; it must have {text}, each once"),
        ("{text} {words}", RECORDS[0], r"it must have {text}, each once, and no other field"),
        ("{text}: ", RECORDS[0], "ends in a space"),
        ("{text} and {text_pair}", RECORDS[0], r"the record has no second text, and the template .* has {text_pair}"),
        ("Say: {text}", {"text": "a", "text_pair": "b"}, r"has a second text, and the template .* has no {text_pair}"),
    ],
)
def test_a_template_that_does_not_fit(template, record, error, tokenizer):
    with pytest.raises(TaskError, match=error):
        build_task("classification", RECORDS, tokenizer, template=template).encode(record, tokenizer)


def test_whole_numbers_as_labels_sort_as_numbers(tokenizer):
    def labels(*found):
        records = [{"text": "a", "label": label} for label in found]
        return build_task("classification", records, tokenizer).labels

    assert labels("10", "2", "0", "-1") == ("-1", "0", "2", "10")
    assert labels("10", "2", "two") == ("10", "2", "two")


PAIR = {"text": "the trophy is large", "text_pair": "the suitcase is large", "label": "card"}


def test_a_pair_has_a_line_break_where_the_tokenizer_puts_nothing_between(tokenizer):
    task = build_task("classification", [PAIR, *RECORDS], tokenizer)
    assert tokenizer.decode(task.encode(PAIR, tokenizer)["input_ids"]) == f"{PAIR['text']}\n{PAIR['text_pair']}"


def test_a_pair_is_encoded_as_the_tokenizer_does():
    tokenizer = train_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    task = build_task("classification", [PAIR, *RECORDS], tokenizer, max_length=9)
    example, plain = task.encode(PAIR, tokenizer), task.encode(RECORDS[1], tokenizer)
    own = tokenizer(PAIR["text"], PAIR["text_pair"], truncation=True, max_length=9)
    assert (example["input_ids"], example["token_type_ids"]) == (own["input_ids"], own["token_type_ids"])
    assert example["truncated"] == len(tokenizer(PAIR["text"], PAIR["text_pair"])["input_ids"]) - 9
    batch = task.collate([example, plain])
    assert batch["token_type_ids"].tolist() == [own["token_type_ids"], [0] * 9]
    assert "token_type_ids" not in task.collate([plain])
    with torch.no_grad():
        model = tiny_classifier(BertConfig)
        expected = model(**{k: torch.tensor([v]) for k, v in own.items()}).logits
        torch.testing.assert_close(task.logits(model, task.collate([example])), expected)


def test_unknown_label(tokenizer):
    task = build_task("classification", RECORDS, tokenizer)
    with pytest.raises(TaskError, match=r"field 'label': 'cash' is not one of 3 labels: air, card, refund"):
        task.encode({"text": "cash", "label": "cash"}, tokenizer)


def test_model_that_does_not_fit(tokenizer):
    task = build_task("classification", RECORDS, tokenizer)
    batch = task.collate(encode_all(task, RECORDS, tokenizer))
    with pytest.raises(TaskError, match="the task has 3 labels"):
        task.logits(tiny_classifier(LlamaConfig, num_labels=2), batch)
    with pytest.raises(TaskError, match="pad_token_id is 5; the tokenizer pads with 0"):
        task.logits(tiny_classifier(LlamaConfig, pad_token_id=5), batch)


def test_too_few_labels(tokenizer):
    with pytest.raises(TaskError, match=r"labels must be at least 2, all different, got \['air'\]"):
        build_task("classification", RECORDS[3:], tokenizer)
    with pytest.raises(TaskError, match="all different"):
        Classification(pad_token_id=0, labels=["a", "a"])
