"""Runs that write text: generate, score, correctness."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from .. import models, runs
from ..data import Reader, ReadingOptions, read_batches, read_records
from ..decision import MAPS
from ..runs.checks import check_generates
from ..runs.correctness import CORRECTNESS_FILE, calibrate_texts, open_correctness
from ..runs.processes import use_device
from ..runs.run import SamplingOptions
from ..runs.scoring import score_file
from ..runs.text_decisions import open_text_decision
from ..runs.texts import WritingOptions, response_examples
from .common import check_files, dumped, named, opened, write_described
from .following import after_calibration


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(WritingOptions, SamplingOptions):
    """How a run writes."""

    seed: int = field(default=0, metadata={"help": "Of the weight samples, and of sampled tokens."})
    batch_size: int = field(default=16, metadata={"help": "Prompts a forward pass."})
    draws: bool = field(
        default=False,
        metadata={
            "help": "Also let each weight sample write an answer of its own, and measure how far they agree: so many "
            "answers more."
        },
    )

    def problems(self) -> list[str]:
        """What is out of its range, and what would be right."""
        return SamplingOptions.problems(self) + super().problems()

    def how(self) -> dict[str, Any]:
        """What an answer and its scores depend on."""
        return super().how() | self.writing()

    def of_generation(self) -> dict[str, Any]:
        """As `Run.generate` takes them; raises as of `WritingOptions`."""
        return super().of_generation() | {"draws": self.draws}


def generate(
    directory: str,
    input: str,
    options: GenerationOptions,
    reading: ReadingOptions,
    output: str | None = None,
    device: str | None = None,
) -> None:
    """Write a JSON line for each prompt: the answer, and what the weight samples say of it.

    The run is one of `bloblora train --task generation`. A line has, in the inputs' order: `answer`, as the posterior
    mean writes it, or by --decoding average each token by the mean probabilities of all draws; and as means over the
    answer's tokens `log_probability`, `predictive_entropy` (all uncertainty, nats), of it `mutual_information` (what
    the model doesn't know) and `expected_entropy` (what the prompt leaves open), whose sums by TokUR are `tokur_total`,
    `tokur_epistemic` and `tokur_aleatoric`; `sequence_log_probability` is that of the whole answer,
    `draw_log_probabilities` the same under each draw, `mixture_log_probability` the log of their mean probability, and
    `log_probability_variance` their variance. `tokens` has the answer's tokens with their values, as `bloblora score`
    gives them. With --draws a line has `draws`, what each draw writes on its own, `agreement` (share of pairs of draws
    that say the same), `self_consistency` (share that says what most say) and `draw_semantic_entropy` (nats, over what
    they say); with --answers M `sampled`, M answers, and their `semantic_entropy` and `discrete_semantic_entropy`, as
    published; with --p-true `p_true`. Of a run that `bloblora correctness` was given also `p_correct`, the probability
    that the answer is right; and of one that `bloblora calibrate` was given `abstain` (whether to withhold the answer),
    `answer_set` and `promises`, what these two promise.

    Examples:
      bloblora generate runs/answers --input prompts.jsonl --output answers.jsonl
      bloblora generate runs/answers --input prompts.jsonl --draws --answers 10
      echo '{"prompt": "Question: Which gas do plants take in?\\nAnswer:"}' | bloblora generate runs/answers --input -

    Args:
        directory: folder of a run.
        input: records with `prompt` or `messages`, as `train` takes them, answers not needed; `-` reads JSON lines from
            standard input and answers them 64 at a time.
        options: of the answers.
        reading: columns of the data; default those of the training data, where they are there.
        output: file to write, which appears when it is complete; default standard output. A name that ends in .csv or
            .tsv makes it a table.
        device: `cpu`, `cuda`, `cuda:N` or `mps`; default the GPU where there is one.
    """
    use_device(device)
    runs.check_alone("generate")
    check_files({"output": output}, {"input": input})
    description = opened(directory)
    correctness = open_correctness(description, "generate", options.how())
    decision = open_text_decision(description, "generate", options.how(), correctness)
    settings: dict[str, Any] = {"batch_size": options.batch_size, "correctness": correctness, "decision": decision}
    settings |= options.of_generation()
    batches = read_batches(input, 64, reading, known=description.known, require_labels=False)

    def load() -> runs.Run:
        return runs.load_run(description, trust_remote_code=options.trust_remote_code)

    def lines(run: runs.Run, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        return run.describe_texts(records, options.samples, options.seed, **settings)

    write_described(input, output, batches, partial(check_generates, description.task), load, lines)


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(SamplingOptions):
    """How a run scores texts."""

    batch_size: int = field(default=16, metadata={"help": "Texts a forward pass."})
    claims: Literal["sentences"] | None = field(
        default=None,
        metadata={"help": "`sentences` scores each sentence of a response that has no `claims` of its own, too."},
    )


def score(
    directory: str,
    input: str,
    options: ScoringOptions,
    reading: ReadingOptions,
    output: str | None = None,
    device: str | None = None,
) -> None:
    """Write a JSON line for each text that is given: its probability under the weight samples, token by token.

    The run is one of `bloblora train --task generation`; a record has a `prompt` and its `response`, or `messages` that
    end in the assistant's. A line has the measures of `generate` but for those of what the draws say, which are
    of several answers, and in `tokens` of each token: `texts`, `ids`, `log_probabilities` (under the mean of the
    draws), `predictive_entropies` and `mutual_information` (nats), `ranks` (1: the most probable token) and
    `draw_log_probabilities`, a list for each draw. `claims` are the parts of a response that a record's own `claims`
    names, texts or [start, end] in characters, each with its scores in the whole text. Of a run that
    `bloblora correctness` was given also `p_correct`, and of one that `bloblora calibrate` was given `abstain`, whether
    to withhold the text, and `promises`.

    With --output a stop loses little: the same command continues from what is in that file, and FILE.meta.json beside
    it says of which run and records it is. Memory holds 256 texts at a time.

    Examples:
      bloblora score runs/answers --input answers.jsonl --output scores.jsonl --claims sentences
      echo '{"prompt": "Which gas do plants take in?", "response": "oxygen"}' | bloblora score runs/answers --input -

    Args:
        directory: folder of a run.
        input: records with a response, as `train` takes them; `-` reads JSON lines from standard input and scores them
            64 at a time.
        options: of the scores.
        reading: columns of the data; default those of the training data, where they are there.
        output: file to write; default standard output. A name that ends in .csv or .tsv makes it a table.
        device: `cpu`, `cuda`, `cuda:N` or `mps`; default the GPU where there is one.
    """
    use_device(device)
    runs.check_alone("score")
    check_files({"output": output}, {"input": input})
    check_generates((description := opened(directory)).task)
    correctness = open_correctness(description, "score", options.how())
    trusted: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    decision = open_text_decision(description, "score", options.how(), correctness)
    settings: dict[str, Any] = {"claims": options.claims, "correctness": correctness, "decision": decision}
    settings["batch_size"] = options.batch_size
    if output is not None and input != "-":
        score_file(
            description,
            Reader(input, reading, known=description.known),
            Path(output),
            options.how(),
            **settings,
            **trusted,
        )
        return

    def lines(run: runs.Run, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        return run.describe_scores(records, options.samples, options.seed, **settings)

    description.check_base()
    tokenizer, first = models.load_tokenizer(description.config.model, **trusted), 1

    def check(records: list[dict[str, Any]]) -> None:
        nonlocal first
        check_generates(description.task, records)
        for _ in response_examples(description.task, records, tokenizer, options.claims, first):
            pass
        first += len(records)

    batches = read_batches(input, 64, reading, known=description.known)
    write_described(input, output, batches, check, partial(runs.load_run, description, **trusted), lines)


def correctness(
    directory: str,
    data: str,
    options: GenerationOptions,
    reading: ReadingOptions,
    matcher: str = "normalized",
    maps: list[str] = list(MAPS),  # noqa: B006  # never changed
    json: bool = False,
    device: str | None = None,
) -> None:
    """Fit the probability that a text is right on labelled texts, for `generate` or `score`.

    Where records have `right`, true or false, their responses are scored, and `score` gives `p_correct` from then on.
    Where they don't, the `response` is a reference: the run answers each prompt, --matcher says whether the answer is
    right, and `generate` gives `p_correct`. Both maps can be there, each for its --samples, --seed and, of answers, how
    they are written (--max-new-tokens, --temperature, --answers …). They are saved in the run's folder as
    correctness.json.

    The map is chosen by 5-fold cross-validation among Platt, beta and isotonic maps of each score and a Platt map of
    all. The metrics are of texts that neither chose nor fitted the map that they got (nested cross-validation): NLL,
    Brier score, ECE with the ECE floor of a perfectly calibrated model, AUROC of right texts against wrong ones, and
    the risk (share of wrong texts) over all coverages (AURC) and at 80 % and 50 %. Texts that the run was trained on
    make all of it worthless.

    Examples:
      bloblora correctness runs/answers --data held_out.jsonl
      bloblora correctness runs/sums --data held_out.jsonl --matcher numeric --max-new-tokens 16
      bloblora correctness runs/sums --data held_out.jsonl --matcher numeric --answers 10 --agree numeric --p-true
      bloblora correctness runs/answers --data held_out.jsonl --matcher judge.py:same_meaning

    Args:
        directory: folder of a run of `bloblora train --task generation`.
        data: labelled records, used for nothing else.
        options: of the answers.
        reading: columns of the data; default those of the training data, where they are there.
        matcher: `exact`, `normalized` (but for case, punctuation, articles and white space), `numeric` (the last number
            of the answer), or a function of answer and reference, `module:function` or `file.py:function`.
        maps: to choose from: `platt`, `beta`, `isotonic`.
        json: print JSON.
        device: `cpu`, `cuda`, `cuda:N` or `mps`; default the GPU where there is one.
    """
    use_device(device)
    runs.check_alone("correctness")
    check_generates((description := opened(directory)).task)
    with named(data):
        records = read_records(data, reading, known=description.known)
        entry = calibrate_texts(
            description,
            records,
            options.how(),
            matcher=matcher,
            maps=maps,
            batch_size=options.batch_size,
            progress=sys.stdout.isatty() and not json,
            trust_remote_code=options.trust_remote_code,
            **options.of_generation(),
        )
    if json:
        print(dumped(entry))
        return
    fitted = entry["correctness"]
    print(f"{fitted['num_right']} of {fitted['num_examples']} texts are right")
    print(f"map: {fitted['kind']} of {', '.join(fitted['scores'])}")
    print(", ".join(f"{name} {value:.4g}" for name, value in fitted["metrics"].items()))
    print(f"saved to {Path(directory) / CORRECTNESS_FILE}; next: {after_calibration(directory, entry['of'])}")
