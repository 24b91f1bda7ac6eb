"""A run as a function from texts to answers, in the format of transformers' text-classification pipeline."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from ..prediction import DISTANCES, Prediction
from .checks import check_kind
from .config import RunError
from .evaluate import lines_of
from .folder import open_run
from .run import PredictionOptions, Run, load_run

_SCORES = ("predictive_entropy", "mutual_information", *DISTANCES)


class AnswerPipeline:
    """What `pipeline` gives."""

    def __init__(self, run: Run, num_samples: int, seed: int, batch_size: int) -> None:
        self.run = run
        self._options: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "batch_size": batch_size}

    def __call__(self, inputs: Any, *, top_k: int | Literal[""] | None = "") -> Any:
        """Answer one input or several.

        Args:
            inputs: a text, a record (``{"text": …}`` or ``{"question": …, "choices": […]}``), or several of them: what
                `bloblora.data.as_records` takes, of a table each row.
            top_k: how many labels or choices of each, the most probable first; None for all.

        Returns:
            A list of ``{"label", "score", "std", "predictive_entropy", "mutual_information"}``: the probability
            averaged over the draws, its standard deviation over them, and the input's total and epistemic uncertainty
            in nats; and its distances from the training data, where the run knows them. Of several inputs a list of
            such lists; as in transformers, without ``top_k`` the best of each in one list. Of a run that predicts
            values what `ValuePrediction.answers` says of each input, in one list.

        Raises:
            RunError: an input of the other kind, or ``top_k`` is below 1.
            DataError: an input can't be used.
        """
        if top_k != "" and self.run.task.family.name != Prediction.kind:
            raise RunError(f"top_k: the run's task is {self.run.task.name}, which has no labels to rank; leave it out")
        if isinstance(top_k, int) and top_k < 1:
            raise RunError(f"top_k must be at least 1, or None for all, got {top_k}")
        records = self.run.records(inputs)
        if not records:
            return []
        ranked = self._ranked(records)
        if top_k == "":
            return [answers[0] for answers in ranked]
        top = [answers[:top_k] for answers in ranked]
        return top[0] if isinstance(inputs, str | Mapping) else top

    def _ranked(self, records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """All labels or choices of each record, the most probable first."""
        check_kind(self.run.task, records)
        prediction = self.run.predict(records, **self._options)
        if prediction.kind != Prediction.kind:
            return [[answer] for answer in prediction.answers([self.run.task.columns(r) for r in records])]
        spread = prediction.std.tolist()
        result = []
        for line, row in zip(lines_of(self.run.task, records, prediction, None), spread, strict=True):
            uncertainty = {name: line[name] for name in _SCORES if name in line}
            answers = [
                {"label": label, "score": score, "std": std, **uncertainty}
                for (label, score), std in zip(line["probabilities"].items(), row, strict=False)  # padded to the widest
            ]
            result.append(sorted(answers, key=lambda answer: -answer["score"]))
        return result


def pipeline(
    run: str | os.PathLike[str] | Run,
    *,
    num_samples: int = 10,
    seed: int = 0,
    batch_size: int = 32,
    trust_remote_code: bool = False,
) -> AnswerPipeline:
    """A run as transformers users call a model: ``pipeline("runs/desk")("where is my parcel")``.

    ``transformers.pipeline`` with the run's model gives what the mean says; this one averages draws of the weights.

    Args:
        run: what `load_run` takes or gives; of a task with labels or choices.
        num_samples: weight draws N; 0 is the posterior mean.
        seed: of the draws; an input's answer depends on nothing else.
        batch_size: inputs a forward.
        trust_remote_code: as of `load_run`.

    Raises:
        RunError: the run can't be loaded or writes text, or an option is out of range.
        AdapterFileError: the run's files are damaged.
    """
    PredictionOptions(samples=num_samples, seed=seed, batch_size=batch_size)
    opened = run if isinstance(run, Run) else open_run(run)
    if opened.task.kind == "generation":
        raise RunError("the run's task is generation, which has no labels; use `bloblora.posterior_generate`")
    loaded = opened if isinstance(opened, Run) else load_run(opened, trust_remote_code=trust_remote_code)
    return AnswerPipeline(loaded, num_samples, seed, batch_size)
