"""`posterior_generate` against transformers' own generate, and against a loop without a cache."""

import itertools

import pytest
import scipy.stats
import torch
from peft import LoraConfig, get_peft_model
from torch.distributions import Categorical
from transformers import GenerationConfig

from bloblora import Posterior
from bloblora.adapter import UnevenPartsError
from bloblora.generation import decoding, posterior_generate
from bloblora.methods.ensemble import Members
from bloblora.methods.laplace import LinearizedDraws
from bloblora.methods.mc_dropout import DroppedColumns
from bloblora.prediction import Sampler, Tempered, WeightDraws
from tests.tasks.conftest import tiny_causal, with_lora

from .conftest import FAMILIES, VOCABULARY, make_case

GREEDY = {"max_new_tokens": 8, "do_sample": False}
# 12 of 60 tokens end an answer, so that rows end at different lengths.
ENDING = {**GREEDY, "eos_token_id": list(range(2, 14))}


def run(case, num_samples=3, inputs=None, **options):
    return posterior_generate(case.model, inputs or case.inputs, num_samples, 4, **{**ENDING, "draws": True, **options})


def assert_same(found, expected, rows):
    """Rows of a generation, whose tensors may be narrower."""
    assert found.texts == [expected.texts[row] for row in rows]
    assert found.draw_texts == [expected.draw_texts[row] for row in rows]
    for name, score in found.scores().items():
        torch.testing.assert_close(score, expected.scores()[name][rows], rtol=0, atol=2e-4)


def padded(tokens, width):
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_new_tokens": 5},
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1, "suppress_tokens": [20, 21]},
        {"eos_token_id": None},
    ],
)
def test_mean_is_generate(family, options, case_of):
    case = case_of(family)
    found = run(case, 0, **options)
    with case.posterior.mean():
        expected = case.written(case.model.generate(**case.inputs, **{**ENDING, **options}))
    assert torch.equal(found.tokens, expected)
    assert torch.equal(found.draw_tokens, expected[None])
    assert found.mutual_information.max() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_write_as_generate(family, case_of):
    """Draw s has the weights that the s-th call of the same generator gives."""
    case, generator = case_of(family), torch.Generator().manual_seed(4)
    found = run(case)
    for tokens in found.draw_tokens:
        with case.posterior.draw(generator):
            expected = case.written(case.model.generate(**case.inputs, **ENDING))
        assert torch.equal(tokens, padded(expected, tokens.shape[1]))
    assert len({tuple(texts) for texts in zip(*found.draw_texts, strict=True)}) == 3


def next_probs(case, inputs, written, draws=3):
    """Probabilities (S, V) of the next token by whole forwards."""
    generator = torch.Generator().manual_seed(4)
    probs = []
    for _ in range(draws):
        with torch.no_grad(), case.posterior.draw(generator):
            if case.is_encoder_decoder:
                start = torch.tensor([[0, *written]])
                logits = case.model(**inputs, decoder_input_ids=start).logits
            else:
                ids = torch.cat([inputs["input_ids"], torch.tensor([written], dtype=torch.long)], dim=1)
                logits = case.model(input_ids=ids).logits
        probs.append(logits[0, -1].double().softmax(-1))
    return torch.stack(probs)


@pytest.mark.parametrize("family", FAMILIES)
def test_averaged_answer_without_cache(family, case_of):
    case = case_of(family)
    found = run(case, decoding="average")
    for row in range(3):
        written, log_probs, entropies, expected_entropies = [], [], [], []
        while len(written) < 8 and (not written or written[-1] not in ENDING["eos_token_id"]):
            probs = next_probs(case, case.alone(row), written)
            mean = probs.mean(0)
            # BART's config forces an end at the last place
            written.append(2 if family == "bart" and len(written) == 7 else int(mean.argmax()))
            log_probs.append(probs[:, written[-1]].log())
            entropies.append(Categorical(mean).entropy())
            expected_entropies.append(Categorical(probs).entropy().mean())
        size = len(written)
        assert found.tokens[row, found.mask[row]].tolist() == written
        close = {"rtol": 0, "atol": 1e-4, "check_dtype": False}
        torch.testing.assert_close(found.draw_log_probs[:, row, :size], torch.stack(log_probs, -1), **close)
        torch.testing.assert_close(found.entropies[row, :size], torch.stack(entropies), **close)
        torch.testing.assert_close(found.expected_entropies[row, :size], torch.stack(expected_entropies), **close)
        assert found.draw_log_probs[:, row, size:].abs().sum() == found.entropies[row, size:].sum() == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampled", [False, True])
def test_the_mean_writes_and_the_draws_read(family, sampled, case_of):
    case, options = case_of(family), {"do_sample": True, "top_p": 0.9} if sampled else {}
    found = run(case, **options)
    assert found.num_samples == len(found.draw_log_probs) == 3
    assert found.texts == run(case, 0, **options).texts
    assert found.draw_texts == run(case, decoding="average", **options).draw_texts
    for row in range(3):
        written, close = found.token_ids()[row], {"rtol": 0, "atol": 1e-4, "check_dtype": False}
        assert padded(torch.tensor([written]), 8).tolist() == padded(found.tokens[None, row], 8).tolist()
        for place, token in enumerate(written):
            probs = next_probs(case, case.alone(row), written[:place])
            mean = probs.mean(0)
            torch.testing.assert_close(found.draw_log_probs[:, row, place], probs[:, token].log(), **close)
            torch.testing.assert_close(found.entropies[row, place], Categorical(mean).entropy(), **close)
            expected = Categorical(probs).entropy().mean()
            torch.testing.assert_close(found.expected_entropies[row, place], expected, **close)
            assert found.ranks[row, place] == 1 + (mean > mean[token]).sum()
    assert found.draw_log_probs.masked_select(~found.mask).abs().sum() == 0
    assert (found.mutual_information > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 0}, {"decoding": "average"}],
)
def test_neither_batch_nor_padding_nor_order_matter(family, options, case_of):
    case = case_of(family)
    together = run(case, **options)
    assert_same(run(case, batch_size=1, **options), together, [0, 1, 2])
    assert_same(run(case, batch_size=2, **options), together, [0, 1, 2])
    for row in range(3):
        assert_same(run(case, inputs=case.alone(row), **options), together, [row])
    for order in ((1, 2, 0), (2, 1, 0)):
        assert_same(run(case, inputs=case.rows(*order), **options), together, list(order))


def test_first_draws_stay_when_more_follow(case_of):
    case = case_of("llama")
    more, fewer = run(case, 5), run(case, 2)
    assert [texts[:2] for texts in more.draw_texts] == fewer.draw_texts


def test_seeds_decide_and_the_global_generator_has_no_part(case_of):
    case = case_of("llama")
    options = {**GREEDY, "do_sample": True}
    state = torch.get_rng_state()
    first = posterior_generate(case.model, case.inputs, 2, 4, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert_same(posterior_generate(case.model, case.inputs, 2, 4, **options), first, [0, 1, 2])
    other = posterior_generate(case.model, case.inputs, 2, 5, **options)
    assert all(a != b for a, b in zip(other.texts, first.texts, strict=True))


def test_sampled_tokens_follow_the_tempered_mean(case_of):
    """χ² of 300 first tokens against p̄^(1/T), cut at top-p."""
    case = case_of("llama")
    inputs, temperature, top_p = case.alone(1), 0.7, 0.6
    mean = next_probs(case, inputs, []).mean(0)
    tempered = mean ** (1 / temperature) / (mean ** (1 / temperature)).sum()
    order = tempered.argsort(descending=True)
    kept = order[: int((tempered[order].cumsum(0) < top_p).sum()) + 1]
    weights = WeightDraws(case.posterior)

    class Fixed(Sampler):
        """Draws of one seed, whatever seed tokens have."""

        def logits(self, forward, num_samples, seed):
            return weights.logits(forward, num_samples, 4)

    options = {"max_new_tokens": 1, "do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    found = [
        posterior_generate(case.model, inputs, 3, seed, sampler=Fixed(), decoding="average", **options).tokens.item()
        for seed in range(300)
    ]
    counts = torch.tensor(found).bincount(minlength=VOCABULARY)[kept]
    assert counts.sum() == 300
    expected = tempered[kept] / tempered[kept].sum() * 300
    assert scipy.stats.chisquare(counts, expected).pvalue > 0.001


def test_draws_of_a_narrow_posterior_are_the_mean():
    case = make_case("llama", 1e-8)
    found = run(case)
    assert found.draw_texts == [[text] * 3 for text in found.texts]
    assert found.texts == run(case, 0).texts
    assert found.mutual_information.max() < 1e-6
    assert found.log_probability_variance.max() < 1e-6
    assert (found.agreement == 1).all()
    assert (found.draw_semantic_entropy == 0).all()


def test_a_plain_lora_is_one_draw():
    model = with_lora(tiny_causal(vocab_size=VOCABULARY), "q_proj", task_type="CAUSAL_LM")
    case = make_case("llama")
    found = posterior_generate(model, case.inputs, 5, draws=True, **GREEDY)
    assert torch.equal(found.tokens, case.written(model.generate(**case.inputs, **GREEDY)))
    assert len(found.draw_tokens) == 1
    assert found.mutual_information.max() == 0


def test_members_of_an_ensemble_are_draws():
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_causal(vocab_size=VOCABULARY), lora, adapter_name="member_0").eval()
    model.add_adapter("member_1", lora)
    case = make_case("llama")
    found = posterior_generate(model, case.inputs, 10, sampler=Members(model), draws=True, **GREEDY)
    expected = []
    for name in ("member_0", "member_1"):
        model.set_adapter(name)
        expected.append(case.written(model.generate(**case.inputs, **GREEDY)))
    assert torch.equal(found.draw_tokens, torch.stack(expected))
    assert (expected[0] != expected[1]).any()


def test_one_mask_of_dropout_is_one_function():
    case = make_case("llama")
    model = with_lora(tiny_causal(vocab_size=VOCABULARY), "q_proj", "v_proj", task_type="CAUSAL_LM")
    weights, generator = DroppedColumns(model, 0.4), torch.Generator().manual_seed(0)
    found = posterior_generate(model, case.inputs, 3, sampler=WeightDraws(weights), draws=True, **GREEDY)
    for tokens in found.draw_tokens:
        with weights.draw(generator):
            assert torch.equal(tokens, case.written(model.generate(**case.inputs, **GREEDY)))


def test_a_temperature_divides_each_draws_logits(case_of):
    case = case_of("llama")
    found = run(case, sampler=Tempered(WeightDraws(case.posterior), 2.0, 2.0), max_new_tokens=1)
    generator = torch.Generator().manual_seed(4)
    for draw in found.draw_log_probs:
        with torch.no_grad(), case.posterior.draw(generator):
            logits = case.model(**case.alone(1)).logits[0, -1]
        expected = (logits / 2).log_softmax(-1)[found.tokens[1, 0]]
        torch.testing.assert_close(draw[1, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # 3 draws of 3 prompts: each prompt once a draw, 7 tokens of the averaged answer, then 7 of the draw's own
        ({"decoding": "average"}, [(9, 7)] + [(9, 1)] * 14),
        ({"decoding": "average", "draws": False}, [(9, 7)] + [(9, 1)] * 7),
        # The mean writes, then each draw reads prompt and answer at once.
        ({"draws": False}, [(3, 7)] + [(3, 1)] * 7 + [(9, 15)]),
        ({}, [(3, 7)] + [(3, 1)] * 7 + [(9, 7)] + [(9, 1)] * 7 + [(9, 15)]),
    ],
)
def test_tokens_are_read_once(options, expected, case_of):
    case, shapes = case_of("llama"), []
    embedding = case.model.get_base_model().get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    run(case, 3, eos_token_id=None, **options)
    hook.remove()
    assert shapes == expected


def test_weights_are_drawn_once(case_of, monkeypatch):
    case, sample, draws = case_of("llama"), Posterior.sample, []
    monkeypatch.setattr(Posterior, "sample", lambda self, generator: draws.append(self) or sample(self, generator))
    run(case, 3, decoding="average")
    assert len(draws) == 3


def test_a_sampler_that_has_one_function_reads_nothing_again(case_of):
    model, forwards = with_lora(tiny_causal(vocab_size=VOCABULARY), "q_proj", task_type="CAUSAL_LM"), []
    hook = model.get_base_model().register_forward_hook(lambda *_: forwards.append(1))
    posterior_generate(model, case_of("llama").inputs, 5, **GREEDY, eos_token_id=None)
    hook.remove()
    assert len(forwards) == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_share_forwards_or_not(family, case_of, monkeypatch):
    """Long prompts, and layers that don't see the batch row by row, have a forward a draw."""
    case = case_of(family)
    together = run(case)
    monkeypatch.setattr(decoding, "_MOST_TOKENS", 43)  # 2 draws of 3 prompts of 7 tokens
    assert_same(run(case), together, [0, 1, 2])
    stacked = Posterior.stacked

    def refused(self, samples, rows):
        if len(samples) > 1:
            raise UnevenPartsError("as in an expert")
        return stacked(self, samples, rows)

    monkeypatch.setattr(Posterior, "stacked", refused)
    assert_same(run(case), together, [0, 1, 2])


def test_modes_and_weights_stay_as_they_were(case_of):
    case = case_of("llama")
    expected = run(case)
    case.model.train()
    try:
        assert_same(run(case), expected, [0, 1, 2])
        assert case.model.training
    finally:
        case.model.eval()


@pytest.fixture
def configured(case_of, monkeypatch):
    """A case whose base model's generation config has some options of its own."""

    def configured(family, **options):
        case = case_of(family)
        for name, value in options.items():
            monkeypatch.setattr(case.model.generation_config, name, value)
        return case

    return configured


@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}],
)
@pytest.mark.parametrize("decoding", ["mean", "average"])
def test_a_base_that_writes_several_answers_writes_one(decoding, options, family, case_of, configured):
    how = {"decoding": decoding, "answers": 2}
    expected = run(case_of(family), **how)
    found = run(configured(family, **options), **how)
    assert_same(found, expected, [0, 1, 2])
    assert found.sampled_texts == expected.sampled_texts


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_offloaded_cache_of_the_base_is_not_taken(family, case_of, configured):
    expected = run(case_of(family))
    assert_same(run(configured(family, cache_implementation="offloaded")), expected, [0, 1, 2])


@pytest.mark.parametrize("decoding", ["mean", "average"])
def test_answers_are_sampled_by_unchanged_probabilities(decoding, case_of, configured):
    """Whatever the base's generation config has, and an answer itself is written by."""
    how = {"decoding": decoding, "answers": 4}
    expected = run(case_of("llama"), **how)
    cutoffs = {"min_p": 0.9, "typical_p": 0.1, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "top_h": 0.1}
    found = run(configured("llama", **cutoffs, repetition_penalty=9.0, top_k=1, top_p=0.1), **how)
    assert found.sampled_texts == expected.sampled_texts
    assert run(case_of("llama"), repetition_penalty=9.0, **how).sampled_texts == expected.sampled_texts


@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 1, "bad_words_ids": [[token] for token in range(14, 30)], "min_new_tokens": 8},
        {"suppress_tokens": [*range(14, 30)], "begin_suppress_tokens": [*range(30, 60)], "forced_eos_token_id": 2},
        {"sequence_bias": [[[20], 50.0]], "exponential_decay_length_penalty": (1, 9.0), "min_length": 40},
        {"forced_bos_token_id": 20, "guidance_scale": 3.0, "encoder_no_repeat_ngram_size": 1},
    ],
)
def test_no_option_of_an_answer_changes_those_that_are_sampled(options, family, case_of, configured):
    """Given or of the base's generation config; nor does a processor of logits."""

    def fixed(ids, scores):
        return scores.scatter(1, torch.full((len(scores), 1), 20), 1e4)

    how = {"answers": 4, "draws": False}
    expected = run(case_of(family), 0, **how).sampled_texts
    assert run(case_of(family), 0, logits_processor=[fixed], **options, **how).sampled_texts == expected
    assert run(configured(family, **options), 0, **how).sampled_texts == expected


@pytest.mark.parametrize("decoding", ["mean", "average"])
def test_padding_without_a_mask_is_no_prompt(decoding, case_of, configured):
    expected = run(case_of("llama"), decoding=decoding)
    case = configured("llama", pad_token_id=0)
    found = run(case, inputs={"input_ids": case.inputs["input_ids"]}, decoding=decoding)
    assert_same(found, expected, [0, 1, 2])
    # A pad token that is an end-of-text token is read, as by `generate`.
    whole = {"input_ids": case.inputs["input_ids"], "attention_mask": torch.ones_like(case.inputs["input_ids"])}
    expected = run(case, inputs=whole, decoding=decoding, eos_token_id=[0, 2])
    found = run(case, inputs={"input_ids": whole["input_ids"]}, decoding=decoding, eos_token_id=[0, 2])
    assert_same(found, expected, [0, 1, 2])


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize(
    "config", [{"decoder_start_token_id": 5}, {"decoder_start_token_id": None, "bos_token_id": 6}], ids=str
)
def test_the_draws_read_from_the_token_that_the_mean_writes_from(config, family, configured, monkeypatch):
    """The first token's probabilities, by a forward of the decoder's start alone."""
    case = configured(family, **config)
    monkeypatch.setattr(case.model.get_base_model().config, "decoder_start_token_id", None)
    start = torch.full((3, 1), config["decoder_start_token_id"] or config["bos_token_id"])
    for n, how in itertools.product((0, 3), ("mean", "average")):
        found = run(case, n, decoding=how, draws=False)
        generator = torch.Generator().manual_seed(4)
        for of_draw in found.draw_log_probs:
            weights = case.posterior.draw(generator) if n else case.posterior.mean()
            with torch.no_grad(), weights:
                logits = case.model(**case.inputs, decoder_input_ids=start).logits[:, 0]
            expected = logits.log_softmax(-1).gather(-1, found.tokens[:, :1]).squeeze(-1)
            torch.testing.assert_close(of_draw[:, 0], expected, rtol=0, atol=1e-4)


def test_another_start_than_the_draws_read_from(case_of, configured):
    case = case_of("bart")
    for options in ({"decoder_start_token_id": 5}, {"generation_config": GenerationConfig(decoder_start_token_id=5)}):
        with pytest.raises(
            ValueError, match=r"decoder_start_token_id must be 0, .* got 5: set it there, or take decod"
        ):
            run(case, **options)
    found = run(case, decoding="average", decoder_start_token_id=5)
    assert_same(found, run(configured("bart", decoder_start_token_id=5), decoding="average"), [0, 1, 2])
    configured("bart", decoder_start_token_id=None, bos_token_id=None)
    case.model.get_base_model().config.decoder_start_token_id, before = None, 0
    try:
        with pytest.raises(ValueError, match="decoder_start_token_id: the model's generation config has none"):
            run(case)
    finally:
        case.model.get_base_model().config.decoder_start_token_id = before


def test_each_row_is_a_prompt(case_of):
    case = case_of("llama")
    method = decoding.Decoding(WeightDraws(case.posterior), 0, 0, case.rows(0))
    with pytest.raises(ValueError, match="generate has made 2 rows of 1 prompts"):
        case.model.generate(**case.rows(0), num_return_sequences=2, do_sample=True, custom_generate=method)


def test_texts_are_the_tokenizers(case_of, tokenizer):
    model = with_lora(tiny_causal(), "q_proj", "v_proj", task_type="CAUSAL_LM")
    inputs = tokenizer(["What?", "Which gas is iron?"], padding=True, padding_side="left", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    found = posterior_generate(model, inputs, tokenizer=tokenizer, **GREEDY)
    assert found.texts == tokenizer.batch_decode(found.tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": -1}, "num_samples must be 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"decoding": "median"}, "decoding must be one of mean, average, got 'median'"),
        ({"inputs": {"input_ids": torch.ones(1, 3).long(), "position_ids": torch.arange(3)[None]}}, "has position_ids"),
        ({"num_beams": 4}, "num_beams must be 1, got 4"),
        ({"num_return_sequences": 2}, "num_return_sequences must be 1, got 2"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams must be 1, got 2"),
        (
            {"generation_config": GenerationConfig(num_return_sequences=3, do_sample=True)},
            "num_return_sequences must be 1, got 3",
        ),
        ({"answers": 2.5}, "answers must be a whole number of at least 0, got 2.5"),
        ({"num_samples": 2.5}, "num_samples must be 0 .* or more, a whole number, got 2.5"),
        ({"answers": 2, "answer_temperature": 1e-38}, "answer_temperature must be at least 1e-06, got 1e-38"),
        ({"answers": 2, "answer_temperature": float("nan")}, "answer_temperature must be at least 1e-06, got nan"),
        ({"do_sample": True, "temperature": 1e-38}, "temperature must be at least 1e-06, got 1e-38"),
        ({"agree": "exact"}, "agree must be a function of two texts, got 'exact'; find_agree gives"),
        ({"use_cache": False}, "use_cache must be True, got False"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache must be True, got False"),
        ({"inputs": {"input_ids": torch.zeros(0, 3)}}, "nothing to answer"),
        (
            {"inputs": {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 0]])}},
            "row 1 of attention_mask ends in padding",
        ),
    ],
)
def test_wrong_options(change, message, case_of):
    case = case_of("llama")
    with pytest.raises(ValueError, match=message):
        posterior_generate(case.model, **{"inputs": case.inputs, **GREEDY, **change})


def test_linearized_draws_cannot_write(case_of):
    model = tiny_causal(vocab_size=VOCABULARY)
    head = torch.nn.Linear(32, VOCABULARY)
    model.lm_head = head
    shape = {"G_values": VOCABULARY, "A_values": 32, "G_vectors": (VOCABULARY,) * 2, "A_vectors": (32, 32)}
    eigen = {f"head.{name}": torch.ones(size) for name, size in shape.items()}
    how = dict(sampler=LinearizedDraws({"head": head}, eigen, 1.0, 0.0), **GREEDY)
    for options in ({}, {"draws": True}, {"answers": 1}, {"decoding": "average"}):
        with pytest.raises(ValueError, match="draws are linearized"):
            posterior_generate(model, case_of("llama").inputs, 2, **how, **options)
