import pytest

from bloblora.tasks import Blank, TaskError

TASK = Blank(pad_token_id=0)


def test_only_the_text_after_the_blank_is_scored(blanks, bos_tokenizer):
    example = TASK.encode(blanks[0], bos_tokenizer)
    assert bos_tokenizer.decode(example["prefix"]) == ("<s>The trophy does not fit into the suitcase because the")
    assert [bos_tokenizer.decode(branch) for branch in example["branches"]] == [
        " trophy is too large.",
        " suitcase is too large.",
    ]
    scored = [b[-n:] for b, n in zip(example["branches"], example["scored"], strict=True)]
    assert [bos_tokenizer.decode(ids) for ids in scored] == [" is too large."] * 2


@pytest.mark.parametrize("kind", ["tokenizer", "bos_tokenizer"])
def test_blank_at_the_start(kind, blanks, request):
    tokenizer = request.getfixturevalue(kind)
    example = TASK.encode(blanks[1], tokenizer)
    assert example["prefix"] == ([] if kind == "tokenizer" else [1])
    assert tokenizer.decode(example["branches"][0]) == "My card was charged twice."
    assert tokenizer.decode(example["branches"][0][-example["scored"][0] :]) == " was charged twice."


def test_long_text_before_the_blank_loses_its_beginning(blanks, bos_tokenizer):
    example = Blank(pad_token_id=0, max_length=25).encode(blanks[0], bos_tokenizer)
    assert len(example["prefix"]) + max(map(len, example["branches"])) == 25
    assert example["prefix"][0] == bos_tokenizer.bos_token_id
    assert bos_tokenizer.decode(example["prefix"]).endswith("because the")
    with pytest.raises(TaskError, match="max_length: 5 tokens are too few"):
        Blank(pad_token_id=0, max_length=5).encode(blanks[0], bos_tokenizer)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("No blank here.", "has 0 blanks '_'; it must have one"),
        ("_ and _ are here.", "has 2 blanks"),
        ("It is the _ ", "no text after '_'"),
    ],
)
def test_wrong_questions(question, message, blanks, tokenizer):
    with pytest.raises(TaskError, match=message):
        TASK.encode(blanks[0] | {"question": question}, tokenizer)
