from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from bloblora.tasks.encoding import continuation_ids, prompt_ids


def llama2_like() -> PreTrainedTokenizerFast:
    """SentencePiece's way: a space is put before every text, and spaces are part of the words."""
    pieces = ["<unk>", "<s>", "▁", "▁a", "▁is", "is", "a", "▁▁", ".", "s", "i", "b"]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("i", "s"), ("▁", "is"), ("▁", "a")])
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def test_continuation_gets_no_second_space():
    tokenizer = llama2_like()
    assert tokenizer.convert_ids_to_tokens(tokenizer(" is")["input_ids"]) == ["▁", "▁is"]
    assert tokenizer.convert_ids_to_tokens(continuation_ids(tokenizer, " is")) == ["▁is"]
    assert tokenizer.convert_ids_to_tokens(continuation_ids(tokenizer, ".")) == ["."]


def test_continuation_of_byte_level_text_is_its_own_tokens(tokenizer):
    for text in (" carbon dioxide", ".", " is too large.", "’s air"):
        assert continuation_ids(tokenizer, text) == tokenizer(text)["input_ids"]


def test_bos_only_where_the_tokenizer_adds_it(tokenizer, bos_tokenizer):
    ids = tokenizer("The air")["input_ids"]
    assert prompt_ids(tokenizer, "The air") == ids
    assert prompt_ids(bos_tokenizer, "The air") == [1, *ids]
    assert prompt_ids(bos_tokenizer, "<s>The air") == [1, *ids]


def test_eos_is_left_out(tokenizer):
    from tokenizers.processors import TemplateProcessing

    from .conftest import train_tokenizer

    adds_eos = train_tokenizer()
    adds_eos.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert adds_eos("The air")["input_ids"][-1] == 2
    assert prompt_ids(adds_eos, "The air") == tokenizer("The air")["input_ids"]
