"""Encoded examples of every task, of different lengths, with a Bayesian tiny model that answers them."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForSequenceClassification

from bloblora import BlobConfig, bayesianize
from bloblora.tasks import Blank, ChoiceLetter, ChoiceText, Classification, encode_all
from tests.tasks.conftest import blanks, questions, tiny_causal, tokenizer, train_tokenizer, with_lora

__all__ = ["blanks", "questions", "tokenizer", "train_tokenizer"]

TASKS = ("classification", "choice_text", "choice_letter", "blank")
TEXTS = ("My card was charged twice, please refund the second payment.", "What?", "Which gas is iron?")


@dataclass
class Case:
    model: PeftModel
    task: Any
    examples: list[dict]


def tiny_classifier(num_labels: int = 3) -> LlamaForSequenceClassification:
    torch.manual_seed(1)
    sizes = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0, num_labels=num_labels, initializer_range=0.2)
    return LlamaForSequenceClassification(config).eval()


def make_case(name: str, tokenizer, questions, blanks, estimator: str = "independent") -> Case:
    if name == "classification":
        task = Classification(pad_token_id=0, labels=("a", "b", "c"))
        model, records = with_lora(tiny_classifier(), "q_proj", "v_proj"), [{"text": text} for text in TEXTS]
    else:
        task = {"choice_text": ChoiceText, "choice_letter": ChoiceLetter, "blank": Blank}[name](pad_token_id=0)
        records = blanks if name == "blank" else questions
        model = with_lora(tiny_causal(), "q_proj", "v_proj", "lm_head")
    bayesianize(model, BlobConfig(init_std=0.16, estimator=estimator))
    return Case(model.eval(), task, encode_all(task, records, tokenizer))


@pytest.fixture
def case_of(tokenizer, questions, blanks):
    return lambda name, estimator="independent": make_case(name, tokenizer, questions, blanks, estimator)


@pytest.fixture
def threads():
    """Sets torch's number of threads until the test's end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
