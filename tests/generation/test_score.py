"""`score` against whole forwards of one text at a time, and against what `posterior_generate` says of its answers."""

import itertools

import pytest
import torch
from torch.distributions import Categorical

from bloblora import BlobConfig, bayesianize
from bloblora.generation import claim_tokens, posterior_generate, score, scoring, sentences
from bloblora.generation.claims import claims_of
from bloblora.methods.ensemble import Members
from bloblora.tasks import TaskError
from tests.tasks.conftest import tiny_causal, with_lora

from .conftest import FAMILIES, VOCABULARY, Case, make_case

PROMPTS = [[5, 9, 11, 3], [7, 8, 20, 21, 22, 30, 31], [5, 9, 11, 3], [40, 41, 42, 43, 44], [5, 9, 11, 3]]
RESPONSES = [[12, 13, 2], [50, 2], [12, 14, 15, 16, 2], [17], [50, 51, 2]]
FIELDS = ("draw_log_probs", "entropies", "expected_entropies", "ranks")


def run(case, rows=range(5), num_samples=3, **options):
    prompts, responses = [PROMPTS[row] for row in rows], [RESPONSES[row] for row in rows]
    return score(case.model, prompts, responses, num_samples, 4, **options)


def assert_same(found, expected, rows):
    """Rows of scores, whose tensors may be narrower."""
    width = found.tokens.shape[1]
    for name in FIELDS:
        close = {"rtol": 0, "atol": 2e-4 if name != "ranks" else 0}
        torch.testing.assert_close(getattr(found, name), getattr(expected, name)[..., rows, :width], **close)
    assert torch.equal(found.mask, expected.mask[rows, :width])


def one_by_one(case, row, num_samples=3):
    """Probabilities (S, T, V) of every next token of one response, by a forward a draw of one text alone."""
    generator, probs = torch.Generator().manual_seed(4), []
    prompt, response = PROMPTS[row], RESPONSES[row]
    for _ in range(num_samples):
        with torch.no_grad(), case.posterior.draw(generator):
            if case.is_encoder_decoder:
                decoder = torch.tensor([[0, *response[:-1]]])
                logits = case.model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]
            else:
                logits = case.model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        probs.append(logits.double().softmax(-1))
    return torch.stack(probs)


@pytest.mark.parametrize("family", FAMILIES)
def test_against_one_text_and_one_draw_at_a_time(family, case_of):
    case = case_of(family)
    found = run(case)
    for row, response in enumerate(RESPONSES):
        probs, size = one_by_one(case, row), len(response)
        mean, places = probs.mean(0), range(size)
        close = {"rtol": 0, "atol": 1e-4, "check_dtype": False}
        torch.testing.assert_close(found.draw_log_probs[:, row, :size], probs[:, places, response].log(), **close)
        torch.testing.assert_close(found.token_log_probs[row, :size], mean[places, response].log(), **close)
        torch.testing.assert_close(found.entropies[row, :size], Categorical(mean).entropy(), **close)
        expected = Categorical(probs).entropy().mean(0)
        torch.testing.assert_close(found.expected_entropies[row, :size], expected, **close)
        order = mean.argsort(-1, descending=True).tolist()
        assert found.ranks[row, :size].tolist() == [o.index(t) + 1 for o, t in zip(order, response, strict=True)]
        assert found.tokens[row, found.mask[row]].tolist() == response
        assert found.draw_log_probs[:, row, size:].abs().sum() == found.ranks[row, size:].sum() == 0
        whole = probs[:, places, response].log().sum(-1)
        torch.testing.assert_close(found.draw_sequence_log_probs[:, row], whole, **{**close, "atol": 1e-3})
        whole_mean = found.sequence_log_probability[row].item()
        assert whole_mean == pytest.approx(mean[places, response].log().sum().item(), abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_batch_nor_padding_nor_order_nor_shared_prompts_matter(family, case_of, monkeypatch):
    case = case_of(family)
    together = run(case)
    for size in (1, 2, 3):
        assert_same(run(case, batch_size=size), together, [*range(5)])
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 17):
        assert_same(run(case, order), together, [*order])
    for row in range(5):
        assert_same(run(case, [row]), together, [row])
    monkeypatch.setattr(scoring, "_MOST_LOGITS", 4 * VOCABULARY)
    assert_same(run(case), together, [*range(5)])


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_written_answers_are_those_of_their_writing(family, case_of):
    case = case_of(family)
    written = posterior_generate(case.model, case.inputs, 3, 4, decoding="average", max_new_tokens=6, do_sample=False)
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(*case.inputs.values(), strict=True)]
    answers = [tokens[mask].tolist() for tokens, mask in zip(written.tokens, written.mask, strict=True)]
    assert_same(score(case.model, prompts, answers, 3, 4), written, [0, 1, 2])
    if family != "bart":  # which forces its last token
        assert written.ranks[written.mask].tolist() == [1] * int(written.mask.sum())


def test_a_shared_prompt_is_read_once(case_of):
    """Three responses to one prompt are one row, of a model that takes a tree's mask."""
    case, widths, same = case_of("llama"), [], [0, 2, 4]
    hook = case.model.register_forward_pre_hook(
        lambda _, __, inputs: widths.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    try:
        found = run(case, same, 1)
    finally:
        hook.remove()
    assert widths == [(1, len(PROMPTS[0]) + sum(len(RESPONSES[row]) for row in same))]
    assert_same(found, run(case, num_samples=1), same)


def test_a_model_that_ignores_a_tree_reads_each_text_alone(case_of, monkeypatch):
    case = case_of("llama")
    expected = run(case)
    monkeypatch.setattr(case.model.config, "_attn_implementation", "flash_attention_2")
    assert not scoring._Trees(case.model).shares([((1,), (2,))])
    monkeypatch.undo()
    monkeypatch.setattr(scoring._Trees, "shares", lambda *_: False)
    assert_same(run(case), expected, [*range(5)])


def test_a_plain_lora_and_an_ensemble():
    model = with_lora(tiny_causal(vocab_size=VOCABULARY), "q_proj", task_type="CAUSAL_LM").eval()
    for sampler in (None, Members(model)):
        found = score(model, PROMPTS, RESPONSES, 5, sampler=sampler)
        assert len(found.draw_log_probs) == 1
        assert_same(found, score(model, PROMPTS, RESPONSES, 0), [*range(5)])


@pytest.mark.parametrize(
    ("family", "layer"), [("llama", "layers.1.self_attn.q_proj"), ("t5", "decoder.block.1.layer.0.SelfAttention.q")]
)
def test_blocks_below_the_first_bayesian_layer(family, layer):
    """Of a posterior over one block alone: what draws share changes nothing."""
    base = make_case(family).model.unload()
    model = with_lora(base, layer, task_type="SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM")
    case = Case(model.eval(), bayesianize(model, BlobConfig(init_std=0.25)), {}, family == "t5")
    found = run(case)
    for row, response in enumerate(RESPONSES):
        expected = one_by_one(case, row)[:, range(len(response)), response].log()
        kept = found.draw_log_probs[:, row, : len(response)]
        torch.testing.assert_close(kept, expected, rtol=0, atol=1e-4, check_dtype=False)


def test_first_draws_stay_and_the_mean_is_one(case_of):
    case = case_of("llama")
    torch.testing.assert_close(run(case, num_samples=5).draw_log_probs[:3], run(case).draw_log_probs)
    mean = run(case, num_samples=0)
    assert len(mean.draw_log_probs) == 1
    assert mean.mutual_information.tolist() == [0] * 5
    with torch.no_grad(), case.posterior.mean():
        logits = case.model(input_ids=torch.tensor([PROMPTS[3] + RESPONSES[3]])).logits
    expected = logits[0, -2].log_softmax(-1)[RESPONSES[3][0]].item()
    assert mean.log_probability[3].item() == pytest.approx(expected, abs=1e-4)


def test_a_claim_is_scored_in_its_context(case_of):
    case = case_of("llama")
    found = run(case)
    part = found.part(2, torch.tensor([False, True, True, False, False]))
    assert part.sequence_log_probability.item() == pytest.approx(found.token_log_probs[2, 1:3].sum().item())
    assert part.predictive_entropy.item() == pytest.approx(found.entropies[2, 1:3].mean().item())
    assert part.mutual_information.item() == pytest.approx(found.token_mutual_information[2, 1:3].mean().item())


def test_sentences_and_claims(tokenizer):
    text = "Plants take CO2. Do they?  Yes!\nOf 3.5 kinds"
    assert [text[a:b] for a, b in sentences(text)] == ["Plants take CO2.", "Do they?", "Yes!", "Of 3.5 kinds"]
    assert sentences(" ") == []
    assert sentences("A") == [(0, 1)]
    assert claims_of({"claims": ["they", [0, 6]]}, text, None) == [(20, 24), (0, 6)]
    text = "carbon dioxide. the card"
    ids = tokenizer(text)["input_ids"]
    first, second = claim_tokens(tokenizer, ids, text, sentences(text))
    assert tokenizer.decode([i for i, of in zip(ids, first, strict=True) if of]).strip() == "carbon dioxide."
    assert tokenizer.decode([i for i, of in zip(ids, second, strict=True) if of]).strip() == "the card"
    with pytest.raises(ValueError, match="claims must be 'sentences' or None, got 'words'"):
        claims_of({}, text, "words")
    for claim, message in (
        ("moon", "item 0: 'moon' must be a part of the response"),
        ([3, 2], "0 <= start < end <= 24"),
        (7, r"must be a text, or \[start, end\]"),
    ):
        with pytest.raises(TaskError, match=message):
            claims_of({"claims": [claim]}, text, None)
    text = "水が好き。鉄"
    ids = tokenizer(text)["input_ids"]
    first, second = claim_tokens(tokenizer, ids, text, [(0, 5), (5, 6)])
    assert (first | second).all()  # also a character's second and third token
    assert first.sum() + second.sum() == len(ids) == len(tokenizer(text[:5])["input_ids"]) + second.sum()
    ids = [*tokenizer("card: the card")["input_ids"], *tokenizer("\n")["input_ids"], tokenizer.eos_token_id]
    (mask,) = claim_tokens(tokenizer, ids, "card", [(0, 4)])  # of a chat, whose template has text of its own before it
    assert tokenizer.decode(torch.tensor(ids)[mask]) == " card"
    assert mask.nonzero().max() == len(ids) - 3
    ids = [*tokenizer("s, yes: s")["input_ids"], tokenizer.eos_token_id]  # </s>
    assert claim_tokens(tokenizer, ids, "s", [(0, 1)])[0].nonzero().tolist() == [[len(ids) - 2]]
    ids = tokenizer("carbon dioxide. the card")["input_ids"]
    text = "carbon dioxide. the card"
    with pytest.raises(TaskError, match="the tokenizer changes the text"):
        claim_tokens(tokenizer, ids, text.upper(), [(0, 1)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "there must be a response to each prompt, got 0 and 5"),
        ({"responses": [*RESPONSES[:4], []]}, r"responses: item 4 is \[\], of which there is nothing to score"),
        ({"prompts": ["a", *PROMPTS[1:]], "responses": [" ", *RESPONSES[1:]]}, "responses: item 0 is ' '"),
        ({"prompts": ["a"], "responses": ["b"]}, "prompts: item 0 is a text; give its tokenizer, or token ids"),
        ({"prompts": ["a", *PROMPTS[1:]]}, "responses: item 0 and its prompt must both be texts, or both token ids"),
        ({"responses": [*RESPONSES[:4], [VOCABULARY]]}, "responses: item 4: 60 is no token id, from 0 to 59"),
        ({"prompts": [[-100], *PROMPTS[1:]]}, "prompts: item 0: -100 is no token id"),
        ({"prompts": [[5.5], *PROMPTS[1:]]}, "prompts: item 0: 5.5 is no token id"),
        ({"num_samples": 2.5}, "num_samples must be 0 .* or more, a whole number, got 2.5"),
        ({"prompts": "a"}, "prompts: 'a' is one text; give a list"),
        ({"num_samples": -1}, "num_samples must be 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
    ],
)
def test_wrong_arguments(change, message, case_of):
    with pytest.raises(ValueError, match=message):
        score(case_of("llama").model, **{"prompts": PROMPTS, "responses": RESPONSES, **change})
