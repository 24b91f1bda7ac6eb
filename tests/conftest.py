"""Tiny real models: two layers with random weights, milliseconds a forward."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

OVER_A = dict(factors="A", head_prior_std="none")
"""Of `BlobConfig`: the Gaussian over A also under a head that classifies."""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """The trainer collects garbage at each start: a third of a second, were it among all that is imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread():
    """Sums in another order differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny base model in a folder."""
    from tests.tiny_base import save_base

    return save_base(tmp_path_factory.mktemp("base"))


def tiny_llama(**overrides) -> PreTrainedModel:
    torch.manual_seed(1)
    config = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(LlamaConfig(**{**config, **overrides}))


def with_lora(base: PreTrainedModel, targets=("q_proj", "v_proj"), trained: bool = True, **options) -> PeftModel:
    """A LoRA on ``base``; with ``trained`` B is random instead of 0, so that A has an effect."""
    torch.manual_seed(2)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **options))
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 97, (4, 7), generator=torch.Generator().manual_seed(3))
