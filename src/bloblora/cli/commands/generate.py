"""The command that writes text."""

import json
import math
from typing import Any

from transformers.utils import logging

from ... import runs
from ...data import read_batches
from ...runs.checks import check_generates
from ...runs.generate import describe_texts
from .output import named, writing

_CHUNK = 64


def generate(
    directory: str,
    input: str,
    samples: int = 10,
    seed: int = 0,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    output: str | None = None,
) -> None:
    """Write a JSON line for each prompt: the answer, the answers of the weight draws, and the uncertainty.

    The run is one of `bloblora train --task generation`. A line has, in the inputs' order: `answer`, each token by the
    mean probabilities of all draws; `draws`, what each draw writes on its own; `agreement` (share of pairs of draws
    that say the same) and `semantic_entropy` (nats, over what they say); and as means over the answer's tokens
    `log_probability`, `predictive_entropy` (all uncertainty, nats), of it `mutual_information` (what the model doesn't
    know) and `expected_entropy` (what the prompt leaves open); `sequence_log_probability` is that of the whole answer,
    and `log_probability_variance` its variance over draws.

    Examples:
      bloblora generate runs/answers --input prompts.jsonl --output answers.jsonl
      echo '{"prompt": "Question: Which gas do plants take in?\\nAnswer:"}' | bloblora generate runs/answers --input -

    Args:
        directory: folder of the run.
        input: records with `prompt` or `messages`, as `train` takes them, answers not needed; `-` reads JSON lines from
            standard input and answers them 64 at a time.
        samples: weight draws N; 0 is the posterior mean.
        seed: of the draws, and of sampled tokens.
        max_new_tokens: most tokens of an answer.
        temperature: 0 takes the most probable token, above it tokens are sampled: 1 by their probabilities.
        top_p: sample only among the most probable tokens that have this probability together.
        batch_size: prompts a forward.
        output: file to write, which appears when it is complete; default standard output.
    """
    logging.disable_progress_bar()
    runs.check_samples(samples, seed, batch_size)
    runs.check_alone("generate")
    options = _options(max_new_tokens, temperature, top_p)
    if output is not None:
        runs.check_writable(output)
    task = runs.open_run(directory).task
    run = None
    with writing(output) as handle:
        for records in read_batches(input, _CHUNK, require_labels=False):
            with named(input):
                check_generates(task, records)
            run = run or runs.load_run(directory)
            for line in describe_texts(run, records, samples, seed, batch_size=batch_size, **options):
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
            handle.flush()


def _options(max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    """As transformers' generate takes them.

    Raises:
        RunError: one is out of its range.
    """
    problems = [f"max_new_tokens must be at least 1, got {max_new_tokens}"] if max_new_tokens < 1 else []
    if not (math.isfinite(temperature) and temperature >= 0):
        problems.append(f"temperature must be a finite number of at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        problems.append(f"top_p must be in (0, 1], got {top_p}")
    if problems:
        raise runs.RunError("\n".join(problems))
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    return {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, **sampling}
