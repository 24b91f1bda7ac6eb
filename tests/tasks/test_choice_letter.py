import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerFast

from bloblora.tasks import ChoiceLetter, ChoiceText, TaskError, encode_all

from .conftest import tiny_causal, with_lora

TASK = ChoiceLetter(pad_token_id=0)


def test_prompt_has_label_before_text_in_order(questions, tokenizer):
    example = TASK.encode(questions[0], tokenizer)
    assert tokenizer.decode(example["input_ids"]) == (
        "Return the label of the correct answer for the question below.\n\n"
        "Question: Which gas do plants take?\n"
        "Choices:\nA) carbon dioxide\nB) iron\nC) sand\nAnswer:"
    )
    assert [tokenizer.decode([token]) for token in example["letter_ids"]] == [" A", " B", " C"]
    assert TASK.columns(questions[0])[example["label"]] == "carbon dioxide"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2"])
def test_logits_are_the_letters_at_the_last_position(family, questions, tokenizer):
    model = tiny_causal(family)
    examples = encode_all(TASK, questions, tokenizer)
    with torch.no_grad():
        logits = TASK.logits(model, TASK.collate(examples))
        for row, example in zip(logits, examples, strict=True):
            plain = model(torch.tensor([example["input_ids"]])).logits[0, -1, example["letter_ids"]]
            torch.testing.assert_close(row[: len(plain)], plain, atol=1e-5, rtol=1e-5)
            assert (row[len(plain) :] == -torch.inf).all()
    assert (logits.softmax(1)[1, 2:] == 0).all()


def test_same_in_any_order(questions, tokenizer):
    model, examples = tiny_causal(), encode_all(TASK, questions, tokenizer)
    with torch.no_grad():
        forwards = TASK.logits(model, TASK.collate(examples))
        backwards = TASK.logits(model, TASK.collate(examples[::-1]))
    torch.testing.assert_close(forwards, backwards.flip(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "lm_head")])
def test_training_and_evaluation_paths_agree(targets, questions, tokenizer):
    model = with_lora(tiny_causal(), *targets)
    batch = TASK.collate(encode_all(TASK, questions, tokenizer))
    evaluated = TASK.logits(model.eval(), batch)
    trained = TASK.logits(model.train(), batch)
    torch.testing.assert_close(evaluated, trained, atol=1e-5, rtol=1e-5)
    torch.nn.functional.cross_entropy(trained, batch["labels"]).backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


def test_capped_logits_take_the_models_own_way(questions, tokenizer):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=0.1)).eval()
    assert TASK.logits(model, TASK.collate(encode_all(TASK, questions[2:], tokenizer))).abs().max() <= 0.1


@pytest.mark.parametrize("task", [TASK, ChoiceText(pad_token_id=0)], ids=lambda t: t.name)
def test_wrapped_for_several_processes(task, questions, tokenizer, tmp_path):
    model = with_lora(tiny_causal(), "q_proj", "lm_head")
    batch = task.collate(encode_all(task, questions, tokenizer))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.testing.assert_close(task.logits(DistributedDataParallel(model), batch), task.logits(model, batch))
    finally:
        distributed.destroy_process_group()


def test_long_question_keeps_instruction_and_choices(questions, tokenizer):
    whole = TASK.encode(questions[2], tokenizer)
    limit = len(whole["input_ids"]) - 10
    example = ChoiceLetter(pad_token_id=0, max_length=limit).encode(questions[2], tokenizer)
    prompt = tokenizer.decode(example["input_ids"])
    assert len(example["input_ids"]) <= limit
    assert prompt.startswith("Return the label")
    assert prompt.endswith("D) water\nAnswer:")
    assert "Which of these" not in prompt


def test_more_choices_than_letters(questions, tokenizer):
    record = questions[0] | {"choices": [str(number) for number in range(27)]}
    with pytest.raises(TaskError, match="27 of them; there are letters for at most 26"):
        TASK.encode(record, tokenizer)


def test_a_letter_of_several_tokens(questions):
    bytes_only = ByteLevelBPETokenizer()
    bytes_only.train_from_iterator(["x"], 260, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only._tokenizer)
    with pytest.raises(TaskError, match="' A' is 2 tokens, not one"):
        TASK.encode(questions[0], tokenizer)
