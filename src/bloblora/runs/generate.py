"""What a run writes."""

from collections.abc import Iterator, Sequence
from typing import Any

from .. import tasks
from ..data import unanswered
from ..generation import Generation, posterior_generate
from .run import Run


def generate(
    run: Run, records: Sequence[dict[str, Any]], num_samples: int = 10, seed: int = 0, **options: Any
) -> Generation:
    """Answers to raw records, in their order, whatever response they have; see `bloblora.generation`."""
    examples = tasks.encode_all(run.task, [unanswered(record) for record in records], run.tokenizer)
    batch = run.task.collate(examples)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    given = {"tokenizer": run.tokenizer, "sampler": run.sampler, **options}
    return posterior_generate(run.model, inputs, num_samples, seed, **given)


def describe_texts(
    run: Run, records: Sequence[dict[str, Any]], num_samples: int = 10, seed: int = 0, **options: Any
) -> Iterator[dict[str, Any]]:
    """For each record the averaged answer, those of the draws, and the uncertainty."""
    found = generate(run, records, num_samples, seed, **options)
    scores = found.scores()
    for i, record in enumerate(records):
        yield {
            **{key: record[key] for key in ("id", "prompt", "messages") if key in record},
            "answer": found.texts[i],
            "draws": found.draw_texts[i],
            **{name: float(values[i]) for name, values in scores.items()},
        }
