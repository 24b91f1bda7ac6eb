"""A real byte-level BPE tokenizer and tiny causal models of four families."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SENTENCES = [
    "Question: Which gas do plants take from the air? Answer: carbon dioxide",
    "The trophy does not fit into the suitcase because the trophy is too large.",
    "Return the label of the correct answer. Choices: A) water B) iron C) light D) sand Answer: A B C D E F",
    "My card was charged twice, please refund the second payment.",
]
LLAMA_LIKE = dict(intermediate_size=64, num_key_value_heads=2, max_position_embeddings=256)
FAMILIES = {
    "llama": (LlamaConfig, LLAMA_LIKE),
    "qwen2": (Qwen2Config, LLAMA_LIKE),
    "mistral": (MistralConfig, LLAMA_LIKE),
    "gemma": (GemmaConfig, LLAMA_LIKE | {"head_dim": 8}),
    "gpt2": (GPT2Config, {"n_positions": 256}),
}


def train_tokenizer(bos: bool = False) -> PreTrainedTokenizerBase:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(SENTENCES, 400, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    if bos:
        bpe._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)


def tiny_causal(family: str = "llama", attention: str = "sdpa", **overrides) -> PreTrainedModel:
    torch.manual_seed(1)
    config, special = FAMILIES[family]
    # Larger weights than usual, so that attention and positions matter.
    common = dict(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
    options = {**common, **tokens, **special, **overrides}
    return AutoModelForCausalLM.from_config(config(**options), attn_implementation=attention).eval()


def with_lora(model: PreTrainedModel, *targets: str, **options) -> PeftModel:
    """A LoRA whose B isn't 0."""
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False, **options)
    return get_peft_model(model, config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(bos=True)


@pytest.fixture(scope="session")
def questions() -> list[dict]:
    return [
        {"question": "Which gas do plants take?", "choices": ["carbon dioxide", "iron", "sand"], "answer": 0},
        {"question": "What?", "choices": ["the second payment", "a card"], "answer": 1},
        {
            "question": "Which of these is the one that the trophy, too large, does not fit into?",
            "choices": ["the suitcase", "the air", "the light of the second label", "water"],
            "answer": 0,
        },
    ]


@pytest.fixture(scope="session")
def blanks() -> list[dict]:
    return [
        {
            "question": "The trophy does not fit into the suitcase because the _ is too large.",
            "choices": ["trophy", "suitcase"],
            "answer": 0,
        },
        {"question": "_ was charged twice.", "choices": ["My card", "The second payment"], "answer": 1},
    ]
