import pytest
import torch

from bloblora.tasks import ChoiceText, TaskError, build_task, encode_all

from .conftest import tiny_causal


def test_prompt_and_choices_read_as_one_text(questions, bos_tokenizer):
    example = ChoiceText(pad_token_id=0).encode(questions[0], bos_tokenizer)
    texts = [bos_tokenizer.decode(example["prefix"] + branch) for branch in example["branches"]]
    start = "<s>Question: Which gas do plants take?\nAnswer: "
    assert texts == [start + "carbon dioxide", start + "iron", start + "sand"]
    assert example["label"] == 0
    assert example["scored"] == [len(branch) for branch in example["branches"]]


def test_length_normalization_is_the_mean_per_token(questions, tokenizer):
    total, mean = (ChoiceText(pad_token_id=0, normalization=how) for how in ("sum", "length"))
    example, model = total.encode(questions[0], tokenizer), tiny_causal()
    lengths = torch.tensor([[len(tokenizer(" " + text)["input_ids"]) for text in questions[0]["choices"]]])
    expected = total.logits(model, total.collate([example])) / lengths
    torch.testing.assert_close(mean.logits(model, mean.collate([example])), expected)


def test_length_normalization_keeps_absent_choices_at_minus_infinity(questions, tokenizer):
    task = ChoiceText(pad_token_id=0, normalization="length")
    batch = task.collate(encode_all(task, questions, tokenizer))
    assert (task.logits(tiny_causal(), batch).softmax(1)[1, 2:] == 0).all()


def test_long_question_loses_its_beginning_with_a_warning(questions, bos_tokenizer, caplog):
    task = build_task("choice_text", questions, bos_tokenizer, max_length=40)
    examples = encode_all(task, questions, bos_tokenizer)
    assert caplog.messages[0].startswith("1 of 3 records have more than max_length=40 tokens")
    whole = ChoiceText(pad_token_id=0).encode(questions[2], bos_tokenizer)
    assert examples[2]["branches"] == whole["branches"]
    assert len(examples[2]["prefix"]) + max(map(len, whole["branches"])) <= 40
    prompt = bos_tokenizer.decode(examples[2]["prefix"])
    assert prompt.startswith("<s>Question: ")
    assert prompt.endswith("fit into?\nAnswer:")
    assert "Which of these" not in prompt
    assert examples[2]["truncated"] > 0
    assert examples[0]["truncated"] == 0


def test_choices_are_never_truncated(questions, tokenizer):
    with pytest.raises(TaskError, match="max_length: 0 tokens are left"):
        ChoiceText(pad_token_id=0, max_length=10).encode(questions[0], tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "Question: {query}"}, r"must have \{question\}"),
        ({"template": "{question} {question}:"}, r"must have \{question\}, each once"),
        ({"template": "{question"}, "expected '}'"),
        ({"template": "{question}\nAnswer: "}, "ends in a space"),
        ({"normalization": "mean"}, "'mean'; it must be 'sum' or 'length'"),
        ({"max_length": 0}, "max_length: 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(TaskError, match=message):
        ChoiceText(pad_token_id=0, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "field 'question': ' '"),
        ({"choices": ["one"]}, "at least 2 texts"),
        ({"choices": "one or two"}, "field 'choices': 'one or two'"),
        ({"choices": ["one", ""]}, "field 'choices', item 1: ''"),
        ({"answer": 3}, r"field 'answer': 3 is not an index into 3 choices \(0..2\)"),
        ({"answer": True}, "field 'answer': True"),
        ({"answer": "0"}, "field 'answer': '0'"),
    ],
)
def test_wrong_records(change, message, questions, tokenizer):
    with pytest.raises(TaskError, match=message):
        ChoiceText(pad_token_id=0).encode(questions[0] | change, tokenizer)


@pytest.mark.bundled_model
def test_default_model_scores_as_separate_sequences(questions):
    from bloblora.models import load_model, load_tokenizer

    from .test_tree import separate_scores

    model, tokenizer = load_model("smollm2-135m").eval(), load_tokenizer("smollm2-135m")
    task = build_task("auto", questions, tokenizer, normalization="sum")
    example = task.encode(questions[0], tokenizer)
    with torch.no_grad():
        logits = task.logits(model, task.collate([example]))[0]
        torch.testing.assert_close(logits, torch.tensor(separate_scores(model, example)), atol=1e-3, rtol=1e-4)
    assert logits.argmax() == questions[0]["answer"]
