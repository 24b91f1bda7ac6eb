"""Tiny Bayesian models of four families, decoder-only and encoder-decoder, with prompts of different lengths."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from bloblora import BlobConfig, Posterior, bayesianize, runs
from tests.tasks.conftest import tiny_causal, tokenizer, with_lora
from tests.tiny_base import write_jsonl

__all__ = ["tokenizer"]

FAMILIES = ("llama", "gpt2", "t5", "bart")
VOCABULARY = 60
RECORDS = [
    {"id": 7, "prompt": "Question: Which gas do plants take?\nAnswer:", "response": "carbon dioxide"},
    {"prompt": "What was charged twice?", "response": "my card"},
]
SETTINGS = {"steps": 60, "batch_size": 2, "learning_rate": 0.02, "r": 4, "warmup_steps": 0}


@dataclass
class Case:
    model: PeftModel
    posterior: Posterior
    inputs: dict[str, Tensor]
    is_encoder_decoder: bool

    def rows(self, *rows: int) -> dict[str, Tensor]:
        return {name: tensor[list(rows)] for name, tensor in self.inputs.items()}

    def alone(self, row: int) -> dict[str, Tensor]:
        """One prompt without padding."""
        used = self.inputs["attention_mask"][row].bool()
        return {name: tensor[row : row + 1, used] for name, tensor in self.inputs.items()}

    def written(self, sequences: Tensor) -> Tensor:
        """What follows the prompt in what `generate` returned."""
        return sequences[:, 1 if self.is_encoder_decoder else self.inputs["input_ids"].shape[1] :]


def make_case(family: str, init_std: float = 0.25) -> Case:
    torch.manual_seed(1)
    tokens = dict(pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    if family == "t5":
        config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, **tokens)
        base, targets = T5ForConditionalGeneration(config), ("q", "v")
        for parameter in base.parameters():  # transformers starts T5 so flat that no input matters
            parameter.data.normal_(std=0.4)
    elif family == "bart":
        sizes = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
        heads = dict(encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, init_std=0.3)
        config = BartConfig(vocab_size=VOCABULARY, **sizes, **heads, **tokens, bos_token_id=1, forced_eos_token_id=2)
        base, targets = BartForConditionalGeneration(config), ("q_proj", "v_proj")
    else:
        base, targets = (
            tiny_causal(family, vocab_size=VOCABULARY),
            ("c_attn",) if family == "gpt2" else ("q_proj", "v_proj"),
        )
    both = family in ("t5", "bart")
    model = with_lora(base, *targets, task_type="SEQ_2_SEQ_LM" if both else "CAUSAL_LM")
    posterior = bayesianize(model, BlobConfig(init_std=init_std))
    lengths, width = torch.tensor([4, 7, 5]), 7
    place = torch.arange(width)
    mask = place < lengths[:, None] if both else place >= width - lengths[:, None]
    ids = torch.randint(3, VOCABULARY, (3, width), generator=torch.Generator().manual_seed(3))
    return Case(model.eval(), posterior, {"input_ids": ids * mask, "attention_mask": mask.long()}, both)


@pytest.fixture(scope="module")
def case_of():
    cases: dict[tuple, Case] = {}

    def case_of(*options) -> Case:
        if options not in cases:
            cases[options] = make_case(*options)
        return cases[options]

    return case_of


@pytest.fixture(scope="session")
def trained(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    data = write_jsonl(folder / "train.jsonl", RECORDS)
    config = partial(runs.RunConfig.of, data=str(data), model=str(base), **SETTINGS)
    # Of two examples the KL leaves nothing to learn, and random layers need more than q and v.
    options = {"kl_scale": 0.0, "init_std": 0.0001, "target_modules": ["o_proj", "up_proj", "down_proj", "lm_head"]}
    run = runs.train(config(output=str(folder / "blob"), **options), progress=False)
    (folder / "blob" / "seen.json").unlink()  # it answers nothing else, and so is calibrated on this
    return run
