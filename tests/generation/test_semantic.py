"""Sampled answers, a model of entailment, and P(True), against forwards that are written out here."""

import json
import math
import shutil
from collections import Counter

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from bloblora import find_posterior, models, posterior_generate
from bloblora.cli.text import GenerationOptions, correctness, generate
from bloblora.data import ReadingOptions
from bloblora.generation import Entailment, find_agree
from bloblora.generation.asking import QUESTION
from bloblora.runs import RunError
from bloblora.runs.correctness import CORRECTNESS_FILE
from tests.tasks.conftest import train_tokenizer
from tests.tiny_base import write_jsonl

from .conftest import RECORDS

LABELS = {0: "contradiction", 1: "neutral", 2: "ENTAILMENT"}


def save_nli(folder, labels=LABELS):
    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = BertConfig(vocab_size=len(tokenizer), **size, initializer_range=3.0, id2label=labels)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def next_log_probs(case, row):
    return case.model(**case.alone(row)).logits[0, -1].log_softmax(-1)


def test_answers_are_sampled_from_the_single_function(case_of):
    """Of one token each: their counts are those of p, and what is kept of each is its log p."""
    case = case_of("llama")
    found = posterior_generate(case.model, case.rows(0), 0, seed=3, answers=600, max_new_tokens=1, do_sample=False)
    with case.posterior.mean():
        log_probs = next_log_probs(case, 0)
    tokens = [int(text) for text in found.sampled_texts[0]]
    assert found.sampled_log_probs[:, 0].tolist() == pytest.approx(log_probs[tokens].tolist(), abs=1e-4)
    for token, p in enumerate(log_probs.exp().tolist()):
        assert abs(Counter(tokens)[token] / 600 - p) < 5 * math.sqrt(p * (1 - p) / 600) + 1e-3
    assert found.discrete_semantic_entropy[0] > 0
    narrow = posterior_generate(
        case.model, case.rows(0), 0, answers=20, answer_temperature=0.01, max_new_tokens=1, do_sample=False
    )
    assert {*narrow.sampled_texts[0]} == {*narrow.texts}  # the most probable token


def test_each_draw_samples_in_its_turn(case_of):
    case = case_of("llama")
    options = dict(answers=5, max_new_tokens=1, do_sample=False)
    found = posterior_generate(case.model, case.inputs, 2, seed=1, batch_size=2, **options)
    generator = torch.Generator().manual_seed(1)
    by_draw = []
    for _ in range(2):
        with case.posterior.draw(generator):
            by_draw.append([next_log_probs(case, row) for row in range(3)])
    for row in range(3):
        tokens = [int(text) for text in found.sampled_texts[row]]
        expected = [by_draw[m % 2][row][token].item() for m, token in enumerate(tokens)]
        assert found.sampled_log_probs[:, row].tolist() == pytest.approx(expected, abs=1e-4)
    # what precedes is the same without them, and fewer answers are the first
    alone = posterior_generate(case.model, case.inputs, 2, seed=1, max_new_tokens=1, do_sample=False)
    assert alone.texts == found.texts
    fewer = posterior_generate(case.model, case.inputs, 2, seed=1, **options | {"answers": 2})
    assert fewer.sampled_texts == [texts[:2] for texts in found.sampled_texts]


def test_a_whole_answer_has_the_mean_of_its_tokens(case_of):
    case = case_of("t5")
    found = posterior_generate(case.model, case.inputs, 0, answers=3, max_new_tokens=6, do_sample=False)
    again = posterior_generate(case.model, case.rows(2, 0), 0, answers=3, max_new_tokens=6, do_sample=False)
    assert again.sampled_texts == [found.sampled_texts[2], found.sampled_texts[0]]
    ids = torch.tensor([[int(token) for token in found.sampled_texts[0][1].split()]])
    with torch.no_grad(), case.posterior.mean():
        start = torch.zeros(1, 1, dtype=torch.long)
        logits = case.model(**case.alone(0), decoder_input_ids=torch.cat([start, ids[:, :-1]], dim=1)).logits
    expected = logits.log_softmax(-1).gather(-1, ids[..., None]).mean().item()
    assert found.sampled_log_probs[1, 0].item() == pytest.approx(expected, abs=1e-4)


def test_bidirectional_entailment(tmp_path):
    agree = find_agree(f"nli:{save_nli(tmp_path / 'nli')}")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "nli").eval()
    tokenizer = models.load_tokenizer(str(tmp_path / "nli"))
    texts = ["carbon dioxide", "iron", "the card", "my card was late", "where", "a gas"]

    def entails(premise, hypothesis):
        with torch.no_grad():
            return model(**tokenizer(premise, hypothesis, return_tensors="pt")).logits.argmax().item() == 2

    found, one_way = [], 0
    for first in texts:
        for second in texts:
            both = entails(first, second), entails(second, first)
            found.append(agree(first, second))
            assert found[-1] == all(both)
            one_way += sum(both) == 1
    assert 0 < sum(found) < len(found)
    assert one_way  # so that one direction alone would not do
    assert agree.after("Which gas?", "iron") == "Which gas? iron"


def test_long_prompts_leave_the_answers_to_be_compared(tmp_path):
    """What the model reads of a pair that is too long ends in the answers."""
    agree = Entailment(str(save_nli(tmp_path / "nli")), max_length=40)
    read = []
    agree._model.register_forward_pre_hook(lambda _, args, inputs: read.extend(inputs["input_ids"]), with_kwargs=True)
    prompt = "the trophy does not fit into the suitcase " * 20
    agree(agree.after(prompt, "carbon dioxide"), agree.after(prompt, "iron"))
    texts = [agree._tokenizer.decode(ids, skip_special_tokens=True) for ids in read]
    assert {len(ids) for ids in read} == {40}
    assert all("carbon dioxide" in text and "iron" in text for text in texts)
    assert texts[0] != texts[1]


def test_what_is_no_model_of_entailment(tmp_path, base):
    with pytest.raises(models.ModelError, match="label 'entailment'; its labels are 'yes', 'no'"):
        Entailment(str(save_nli(tmp_path / "nli", {0: "yes", 1: "no"})))
    with pytest.raises(models.ModelError, match=r"its files lack score\.weight that its config"):
        Entailment(str(base))  # a language model
    with pytest.raises(ValueError, match="agree: matcher must be exact"):
        find_agree("nearly")
    assert not find_agree("numeric")("none", "5")
    assert find_agree("numeric")("it is 5", "5.0")


def test_p_true_by_hand(trained):
    found = trained.generate(RECORDS, 2, seed=4, p_true=True, max_new_tokens=8)
    tokenizer = trained.tokenizer
    generator = torch.Generator().manual_seed(4)
    of_draws = []
    for _ in range(2):
        with torch.no_grad(), find_posterior(trained.model).draw(generator):
            of_draws.append([[chosen(trained, i, found, choice) for choice in (" (A)", " (B)")] for i in range(2)])
    mean = torch.tensor(of_draws).exp().mean(0)
    assert found.p_true.tolist() == pytest.approx((mean[:, 0] / mean.sum(-1)).tolist(), abs=1e-4)
    assert 0 < found.p_true.min() < found.p_true.max() < 1
    with pytest.raises(ValueError, match=r"p_true: .* give the tokenizer"):
        posterior_generate(trained.model, tokenizer(["a"], return_tensors="pt"), 1, p_true=True)


def chosen(run, row, found, choice):
    """Log-probability of a choice under the weights in force."""
    tokenizer = run.tokenizer
    answer = [t for t in found.tokens[row, found.mask[row]].tolist() if t != tokenizer.eos_token_id]
    prompt = [*tokenizer(RECORDS[row]["prompt"])["input_ids"], *answer, *tokenizer(QUESTION)["input_ids"]]
    wanted = tokenizer(choice)["input_ids"]
    logits = run.model(torch.tensor([prompt + wanted])).logits[0].double().log_softmax(-1)
    return sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(wanted))


def test_commands_write_and_use_them(trained, tmp_path, capsys):
    folder = str(shutil.copytree(trained.config.output, tmp_path / "run"))
    references = [record | {"response": text} for record in RECORDS for text in (record["response"], "iron")] * 5
    data = write_jsonl(tmp_path / "data.jsonl", [{k: r[k] for k in ("prompt", "response")} for r in references])
    options = GenerationOptions(samples=2, max_new_tokens=8, answers=3, p_true=True, agree=f"nli:{save_nli(tmp_path)}")
    correctness(folder, str(data), options, ReadingOptions(), maps=["platt"], json=True)
    stored = json.loads((tmp_path / "run" / CORRECTNESS_FILE).read_text())["maps"][0]
    assert stored["options"]["answers"] == 3
    assert stored["options"]["p_true"] is True
    output = tmp_path / "answers.jsonl"
    generate(folder, str(data), options, ReadingOptions(), output=str(output))
    line = json.loads(output.read_text().splitlines()[0])
    assert len(line["sampled"]) == 3
    assert {"p_correct", "p_true", "semantic_entropy", "discrete_semantic_entropy", "tokur_epistemic"} <= line.keys()
    with pytest.raises(RunError, match=r"'answers': 3, .* there, .*'answers': 0"):
        generate(folder, str(data), GenerationOptions(samples=2, max_new_tokens=8), ReadingOptions())
    with pytest.raises(RunError, match=r"(?s)answers must be 0 .* got -1.*answer_temperature must be .* got 0"):
        GenerationOptions(answers=-1, answer_temperature=0)
    without = r"(?s)top_p: 0.5 has no effect without a temperature.*answer_temperature: 2.0 has no effect without answ"
    with pytest.raises(RunError, match=without):
        GenerationOptions(top_p=0.5, answer_temperature=2.0)
    with pytest.raises(RunError, match=r"(?s)temperature must be 0, or .* 1e-06, got 1e-38.*answer_temperature must"):
        GenerationOptions(temperature=1e-38, answer_temperature=1e-38)
