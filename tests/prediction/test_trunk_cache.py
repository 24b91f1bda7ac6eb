"""Training and prediction from cached hidden states are those of the whole model."""

import copy
import resource
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from bloblora import BlobConfig, BlobTrainer, BlobTrainingArguments, bayesianize, find_posterior, predict
from bloblora.prediction import trunk_cache
from bloblora.prediction.trunk_cache import cache_trunk
from bloblora.tasks import Blank, ChoiceLetter, ChoiceText, Classification, encode_all
from tests.tasks.conftest import tiny_causal

from .conftest import TEXTS, tiny_classifier

LABELS = ("a", "b", "c")


def case(name, tokenizer, questions, blanks, dtype=torch.float32):
    """A model whose last block is adapted, a task and its labelled examples."""
    if name == "classification":
        base, task = tiny_classifier(), Classification(pad_token_id=0, labels=LABELS)
        records = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    else:
        task = {"choice_text": ChoiceText, "choice_letter": ChoiceLetter, "blank": Blank}[name](pad_token_id=0)
        base, records = tiny_causal(), blanks if name == "blank" else questions
        records = [record | {"answer": 0} for record in records]
    targets = ["q_proj", "v_proj"] if name == "classification" else ["q_proj", "lm_head"]
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    if name == "classification":
        lora.layers_to_transform = [1]
    else:
        lora.target_modules = ["layers.1.self_attn.q_proj", "lm_head"]
    model = get_peft_model(base.to(dtype), lora)
    bayesianize(model, BlobConfig(init_std=0.16))
    return model.eval(), task, encode_all(task, records, tokenizer)


@pytest.mark.parametrize("name", ["classification", "choice_text", "choice_letter", "blank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_are_those_of_the_whole_model(name, dtype, tokenizer, questions, blanks, tmp_path):
    model, task, examples = case(name, tokenizer, questions, blanks, dtype)
    cached_task, cached = cache_trunk(model, task, examples, tmp_path, batch_size=2)
    for batch_size in (1, 3):
        found = predict(model, cached, 3, task=cached_task, batch_size=batch_size).draw_probabilities
        expected = predict(model, examples, 3, task=task, batch_size=batch_size).draw_probabilities
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_a_full_disk_is_an_error_that_leaves_nothing(tokenizer, questions, blanks, tmp_path):
    model, task, examples = case("classification", tokenizer, questions, blanks)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*\.partial'"):
            cache_trunk(model, task, examples, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["classification", "choice_text"])
def test_training_is_that_of_the_whole_model(name, tokenizer, questions, blanks, tmp_path):
    """Also the trunk isn't computed: its blocks' own forwards are never called."""
    model, task, examples = case(name, tokenizer, questions, blanks)
    other = copy.deepcopy(model)
    cached_task, cached = cache_trunk(other, task, examples, tmp_path / "cache")
    calls = []
    other.base_model.model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for trained, the_task, data in ((model, task, examples), (other, cached_task, cached)):
        torch.manual_seed(0)
        arguments = BlobTrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=0.01,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
        )
        BlobTrainer(trained, arguments, task=the_task, train_dataset=data, data_collator=the_task.collate).train()
    assert not calls
    for name_, mean in find_posterior(model).named_means().items():
        torch.testing.assert_close(find_posterior(other).named_means()[name_], mean, rtol=1e-3, atol=1e-5)


def test_the_cache_is_found_again_and_never_for_something_else(tokenizer, questions, blanks, tmp_path):
    model, task, examples = case("classification", tokenizer, questions, blanks)
    cache_trunk(model, task, examples, tmp_path)
    (file,) = tmp_path.glob("*.npy")
    before = file.stat().st_mtime_ns
    with torch.no_grad():  # what lies above the trunk doesn't matter
        model.base_model.model.model.layers[1].mlp.up_proj.weight.mul_(2)
    cache_trunk(model, task, examples, tmp_path)
    assert [f.stat().st_mtime_ns for f in tmp_path.glob("*.npy")] == [before]
    cache_trunk(model, task, examples[:2], tmp_path)
    assert len([*tmp_path.glob("*.npy")]) == 2
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    cache_trunk(model, task, examples, tmp_path)
    assert len([*tmp_path.glob("*.npy")]) == 3
    assert not [*tmp_path.glob("*.partial")]


def test_two_runs_that_start_together_compute_it_once(tokenizer, questions, blanks, tmp_path, monkeypatch):
    cases = [case("classification", tokenizer, questions, blanks) for _ in range(2)]
    cases[1][0].load_state_dict(cases[0][0].state_dict())
    forwards, compute = [], trunk_cache._compute

    def counted(*args):
        forwards.append(1)
        time.sleep(0.1)
        return compute(*args)

    monkeypatch.setattr(trunk_cache, "_compute", counted)
    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(lambda of: cache_trunk(*of, tmp_path, batch_size=2), cases)]
    assert len(forwards) == -(-len(cases[0][2]) // 2)
    assert np.array_equal(found[0][0].hidden, found[1][0].hidden)


def test_a_model_without_a_trunk(tokenizer, tmp_path):
    model = get_peft_model(tiny_classifier(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapt only layers above its first block"):
        cache_trunk(model, Classification(pad_token_id=0, labels=LABELS), [], tmp_path)
