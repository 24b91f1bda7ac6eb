import json

import pytest
import torch
from tokenizers.normalizers import Replace
from torch.nn.functional import cross_entropy

from bloblora.tasks import TaskError, TextGeneration, build_task, encode_all, task_from_dict

from .conftest import tiny_causal, train_tokenizer

RECORDS = [
    {"prompt": "Question: Which gas do plants take?\nAnswer:", "response": "carbon dioxide"},
    {"prompt": "What? ", "response": " the second payment"},
    {"prompt": "The trophy, too large, does not fit into the suitcase.\n", "response": "water"},
]
CHAT = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "Which gas?"},
    {"role": "assistant", "content": "iron"},
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "carbon dioxide"},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = train_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def log_likelihood(model, example) -> torch.Tensor:
    """The sum over the response's tokens, from a whole forward of this example alone."""
    ids = torch.tensor([example["prompt"] + example["response"]])
    log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    of_tokens = log_probs.gather(-1, ids[0, 1:, None]).squeeze(-1)
    return of_tokens[len(example["prompt"]) - 1 :].sum()


def test_prompt_and_response_read_as_one_text(bos_tokenizer):
    task = build_task("auto", RECORDS, bos_tokenizer)
    assert isinstance(task, TextGeneration)
    texts = [
        (bos_tokenizer.decode(example["prompt"]), bos_tokenizer.decode(example["response"]))
        for example in encode_all(task, RECORDS, bos_tokenizer)
    ]
    assert texts == [
        ("<s>Question: Which gas do plants take?\nAnswer:", " carbon dioxide</s>"),
        ("<s>What?", " the second payment</s>"),
        ("<s>The trophy, too large, does not fit into the suitcase.\n", "water</s>"),
    ]
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_of_a_chat_only_the_last_message_is_learnt(chat_tokenizer):
    task = build_task("auto", [{"messages": CHAT}], chat_tokenizer)
    example = task.encode({"messages": CHAT}, chat_tokenizer)
    assert chat_tokenizer.decode(example["prompt"]) == (
        "<system>Answer.</s>\n<user>Which gas?</s>\n<assistant>iron</s>\n<user>What?</s>\n<assistant>"
    )
    assert chat_tokenizer.decode(example["response"]) == "carbon dioxide</s>"
    asked = task.encode({"messages": CHAT[:-1]}, chat_tokenizer)
    assert asked == {"prompt": example["prompt"], "truncated": 0}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_cross_entropy_is_the_sum_over_tokens(family, tokenizer):
    task, model = TextGeneration(pad_token_id=0), tiny_causal(family)
    examples = encode_all(task, RECORDS, tokenizer)
    batch = task.collate(examples)
    logits = task.logits(model, batch)
    expected = torch.stack([-log_likelihood(model, example) for example in examples])
    torch.testing.assert_close(cross_entropy(logits, batch["labels"], reduction="none"), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(3))


def test_its_gradient_is_the_sums(tokenizer):
    task, model = TextGeneration(pad_token_id=0), tiny_causal()
    examples = encode_all(task, RECORDS, tokenizer)
    batch = task.collate(examples)
    weight = model.lm_head.weight
    found = torch.autograd.grad(cross_entropy(task.logits(model, batch), batch["labels"]), weight)[0]
    mean = sum(-log_likelihood(model, example) for example in examples) / 3
    torch.testing.assert_close(found, torch.autograd.grad(mean, weight)[0], rtol=1e-4, atol=1e-5)


def test_a_certain_response_has_a_finite_gradient(tokenizer, monkeypatch):
    task = TextGeneration(pad_token_id=0)
    certain = torch.zeros(1, 2, requires_grad=True)
    monkeypatch.setattr(TextGeneration, "token_log_probs", lambda *_: certain)
    loss = cross_entropy(task.logits(None, {}), torch.tensor([0]))
    loss.backward()
    assert 0 <= loss.item() < 2e-6
    assert torch.isfinite(certain.grad).all()


def test_a_response_may_bring_the_token_that_ends_it(tokenizer):
    task = TextGeneration(pad_token_id=0)
    plain, ended = (task.encode({"prompt": "What?", "response": text}, tokenizer) for text in ("iron", "iron</s> "))
    assert ended == plain


def test_prompts_alone(tokenizer):
    task = TextGeneration(pad_token_id=0)
    examples = encode_all(task, [{"prompt": "What?"}, {"prompt": "Which gas do plants take?"}], tokenizer)
    batch = task.collate(examples)
    assert batch.keys() == {"input_ids", "attention_mask", "position_ids"}
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]


def test_a_long_prompt_loses_its_beginning_and_a_response_nothing(bos_tokenizer, caplog):
    task = build_task("generation", RECORDS, bos_tokenizer, max_length=24)
    examples = encode_all(task, RECORDS, bos_tokenizer)
    assert "max_length=24 tokens: the beginning of the question or prompt was cut off" in caplog.text
    whole = TextGeneration(pad_token_id=0).encode(RECORDS[0], bos_tokenizer)
    assert [examples[0]["response"], task.length(examples[0])] == [whole["response"], 24]
    assert examples[0]["prompt"][0] == bos_tokenizer.bos_token_id
    assert examples[0]["prompt"][1:] == whole["prompt"][1 - len(examples[0]["prompt"]) :]
    with pytest.raises(TaskError, match="max_length: 3 tokens are too few for the response, 11 tokens"):
        TextGeneration(pad_token_id=0, max_length=3).encode(RECORDS[0], bos_tokenizer)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": " "}, "field 'prompt': ' '"),
        ({"prompt": "What?", "response": ""}, "field 'response': ''"),
        ({"messages": []}, r"field 'messages': \[\] must be a list"),
        ({"messages": [{"role": "user"}]}, "field 'messages', item 0: .*must have 'role' and 'content'"),
        ({"messages": CHAT[-1:]}, "the only one is the assistant's"),
        ({"prompt": "What?", "response": "iron</s> sand"}, "response: ' sand' follows the end-of-text token '</s>'"),
        (
            {"messages": [*CHAT[:-1], {"role": "assistant", "content": "iron</s>sand"}]},
            r"response: 'sand\\n' follows the end-of-text token '</s>', which ends a response; leave that token out",
        ),
    ],
)
def test_wrong_records(record, message, chat_tokenizer):
    with pytest.raises(TaskError, match=message):
        TextGeneration(pad_token_id=0).encode(record, chat_tokenizer)


def test_a_prompt_without_a_token_leaves_nothing_to_read():
    """As one of characters that a tokenizer drops, or a chat that its template leaves out."""
    task, dropping = TextGeneration(pad_token_id=0), train_tokenizer()
    dropping.backend_tokenizer.normalizer = Replace("\u200b", "")
    with pytest.raises(TaskError, match=r"field 'prompt': the tokenizer makes no token of '\\u200b'; it must have one"):
        task.encode({"prompt": "\u200b"}, dropping)
    dropping.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(
        TaskError, match=r"field 'messages': the tokenizer's chat template makes no token of \[\{'role'"
    ):
        task.encode({"messages": [{"role": "system", "content": "hello"}]}, dropping)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "can't be filled: roles must alternate"),
        ("{{ messages | length }}", "changes what precedes the last message"),
    ],
)
def test_templates_that_do_not_serve(template, message):
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TaskError, match=message):
        TextGeneration(pad_token_id=0).encode({"messages": CHAT}, tokenizer)
