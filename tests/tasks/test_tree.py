"""A packed tree gives each choice the log-likelihood it has in a row of its own."""

import pytest
import torch

from bloblora.tasks import Blank, ChoiceText, TaskError, build_task, encode_all
from bloblora.tasks.choice_text import collate_trees, tree_log_likelihoods

from .conftest import tiny_causal


def separate_scores(model, example) -> list[float]:
    """Each choice as an ordinary sequence, by the mean NLL that the model gives as its loss."""
    scores = []
    for branch, scored in zip(example["branches"], example["scored"], strict=True):
        ids = torch.tensor([example["prefix"] + branch])
        labels = ids.clone()
        labels[:, : ids.shape[1] - scored] = -100
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        scores.append(-output.loss.item() * scored)
    return scores


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2"])
@pytest.mark.parametrize(
    "task", [ChoiceText(pad_token_id=0, normalization="sum"), Blank(pad_token_id=0)], ids=lambda t: t.name
)
def test_equals_choices_scored_separately(task, family, attention, questions, blanks, bos_tokenizer):
    model = tiny_causal(family, attention)
    examples = encode_all(task, blanks if task.name == "blank" else questions, bos_tokenizer)
    with torch.no_grad():
        logits = task.logits(model, task.collate(examples))
        for row, example in zip(logits, examples, strict=True):
            separate = separate_scores(model, example)
            torch.testing.assert_close(row[: len(separate)], torch.tensor(separate), atol=1e-5, rtol=1e-6)
            assert (row[len(separate) :] == -torch.inf).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_same_alone_in_any_batch_and_order(family, questions, tokenizer):
    model, task = tiny_causal(family), build_task("choice_text", questions, tokenizer)
    examples = encode_all(task, questions, tokenizer)
    with torch.no_grad():
        together = task.logits(model, task.collate(examples))
        backwards = task.logits(model, task.collate(examples[::-1])).flip(0)
        for index, example in enumerate(examples):
            alone = task.logits(model, task.collate([example]))[0]
            torch.testing.assert_close(together[index, : len(alone)], alone, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(together, backwards, atol=1e-5, rtol=1e-6)


def test_mask_and_positions_by_hand():
    example = {"prefix": [5, 6], "branches": [[7], [8, 9]], "scored": [1, 1]}
    batch = collate_trees([example, {"prefix": [5, 6, 7], "branches": [[8], [8, 9]], "scored": [1, 2]}], 0)
    assert batch["input_ids"][0].tolist() == [0, 5, 6, 7, 8, 9]
    assert batch["position_ids"][0].tolist() == [0, 0, 1, 2, 2, 3]
    assert batch["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 1, 0],
        [0, 1, 1, 0, 1, 1],
    ]
    # Of the last four positions (6, 7, 8, 9): 7 and 8 come after 6, 9 after 8; 8 isn't scored.
    assert batch["choice_ids"][0].tolist() == [0, -1, 1]
    assert batch["sources"][0].tolist() == [0, 0, 2]
    assert batch["choice_lengths"].tolist() == [[1, 1], [1, 2]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_are_finite_and_equal_the_separate_ones(attention, questions, tokenizer):
    model, task = tiny_causal("llama", attention), ChoiceText(pad_token_id=0, normalization="sum")
    examples = encode_all(task, questions, tokenizer)
    batch = task.collate(examples)
    torch.nn.functional.cross_entropy(task.logits(model, batch), batch["labels"]).backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = torch.tensor(0.0)
    for example in examples:
        scores = []
        for branch in example["branches"]:
            ids = torch.tensor(example["prefix"] + branch)
            log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1)
            scores.append(log_probs.gather(1, ids[1:, None])[-len(branch) :].sum())
        loss = loss - torch.stack(scores).log_softmax(0)[example["label"]] / len(examples)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert packed[name].isfinite().all()
        torch.testing.assert_close(packed[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_bfloat16_is_finite_and_near_float32(questions, tokenizer):
    task = ChoiceText(pad_token_id=0)
    batch = task.collate(encode_all(task, questions[:1], tokenizer))
    with torch.no_grad():
        exact = task.logits(tiny_causal(), batch)
        for attention in ("sdpa", "eager"):
            rounded = task.logits(tiny_causal("llama", attention).bfloat16(), batch)
            assert rounded.dtype == torch.float32
            torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0.5)


def test_autocast_is_finite(questions, tokenizer):
    task = ChoiceText(pad_token_id=0)
    batch = task.collate(encode_all(task, questions[:2], tokenizer))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert task.logits(tiny_causal(), batch)[0].isfinite().all()


def test_sliding_window_is_used_while_it_holds_the_question(questions, tokenizer):
    task = ChoiceText(pad_token_id=0)
    batch = task.collate(encode_all(task, questions, tokenizer))
    longest, width = int(batch["position_ids"].max()) + 1, batch["input_ids"].shape[1]
    assert longest < width
    full = tree_log_likelihoods(tiny_causal("mistral", sliding_window=None), batch)
    torch.testing.assert_close(tree_log_likelihoods(tiny_causal("mistral", sliding_window=longest), batch), full)
    with pytest.raises(TaskError, match=f"has {longest} tokens and the model's attention window {longest - 1}"):
        tree_log_likelihoods(tiny_causal("mistral", sliding_window=longest - 1), batch)


def test_models_that_would_ignore_the_mask_are_refused(questions, tokenizer):
    from transformers import MambaConfig, MambaForCausalLM

    task = ChoiceText(pad_token_id=0)
    batch = task.collate(encode_all(task, questions, tokenizer))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(TaskError, match="choice_letter"):
        task.logits(mamba, batch)
    model = tiny_causal()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TaskError, match="'flash_attention_2' takes no 4D attention mask"):
        task.logits(model, batch)
