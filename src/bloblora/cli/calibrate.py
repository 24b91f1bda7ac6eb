"""Choose from held-out data what a run promises."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import runs
from ..data import Known, ReadingOptions, read_records, unanswered
from ..decision import changed, check_promises
from ..decision.conformal import Kind, Score
from ..messages import quoted
from ..runs import PredictionOptions, RunDescription, RunError
from ..runs.checks import warn_of_copies
from ..runs.decide import DECISION_FILE, DECISIONS, calibrate_on
from ..runs.decide import calibrate as calibrate_run
from ..runs.outcome import log
from ..runs.predictions import answer_of, check_made_by, count_outside, predicted_records, read_predictions
from ..runs.processes import use_device
from ..runs.seen import unseen, unseen_predictions
from ..runs.text_decisions import promise_texts
from ..runs.texts import WritingOptions
from .common import check_files, dumped, named, opened, read_for, realized
from .following import after_calibration
from .text import GenerationOptions


def calibrate(
    options: PredictionOptions,
    reading: ReadingOptions,
    writing: WritingOptions,
    directory: str | None = None,
    data: str | None = None,
    predictions: str | None = None,
    ood: str | None = None,
    risk: float = 0.05,
    confidence: float = 0.95,
    coverage: float = 0.9,
    label_sets: Kind = "lac",
    false_alarm: float = 0.05,
    score: Score | None = None,
    matcher: str = "normalized",
    by: str = "p_correct",
    output: str | None = None,
    json: bool = False,
    device: str | None = None,
) -> None:
    """Choose from held-out labelled data when to answer, which labels to name, and what to call out of scope.

    Three rules are saved in the run's folder as decision.json, each with what it promises on data like these:
      answer or abstain   at most --risk errors among the answers, with probability --confidence
      label set           at least --coverage of the sets hold the right label
      out of scope        at most --false-alarm of inputs in scope are flagged
    Of a run that predicts values, several labels at once or tags of words, there is the last one and:
      interval            at least --coverage of the intervals hold the right value
      label thresholds    each label is named for at least --coverage of the inputs that have it
      tag sets            for at least --coverage of the inputs the sets of all words hold the right tags
    `predict` and `evaluate` use them from then on, with the same --samples, --seed and --approximate; calibrate again
    with others to have rules for both. A rule that the data can't carry is left out, and the message says why; where
    they carry none, that is an error. The predictions are kept in the run's folder, so that other promises on the same
    data need no model. Records that the run was trained on, or that chose its checkpoint, make the promises worthless:
    few are left out, half of all are an error.

    --predictions FILE takes what was predicted elsewhere, by this run or any other model: JSON lines with
    `probabilities` (by label, or a list) and `target` (the right label, or its index), of several labels at once with
    the list of the right ones in `target`, of preferences with `probabilities` by response and the chosen one in
    `target`, and of values with `value`, `std` and `target`; such as lines of `predict` with the target added. Or a
    .csv with the same in columns, one for each label. Of tags of words `probabilities` is a list with an object by tag
    for each word, and `target` the list of the right tags; or lines that `evaluate --predictions` wrote, of which those
    of its --ood are taken as out of scope. With --data the right answers are those of its records, in the same order.

    Of a run that writes text, data are as for `bloblora correctness`, but other records than it was given. The rules
    are for `generate`, or where records have `right` for `score`, with the same --samples and --seed, and of answers
    how they are written (--max-new-tokens, --temperature, --answers …):
      abstain or not      at most --risk of the texts that are not withheld are wrong, with probability --confidence
      answer set          at least --coverage of the sets hold a right answer: the answer, and the first of the other
                          answers of the weight samples, the most frequent first; not of texts that are given

    Examples:
      bloblora calibrate runs/desk --data held_out.jsonl --risk 0.1
      bloblora calibrate runs/answers --data held_out.jsonl --risk 0.2 --coverage 0.6 --matcher numeric
      bloblora calibrate runs/desk --data support_desk:validation --risk 0.2 --ood support_desk:out_of_scope
      bloblora calibrate --predictions other_model.csv --risk 0.1 --output decision.json

    Args:
        directory: folder of a run; needed without --predictions.
        data: labelled records in scope, in the forms that `train` takes, used for nothing else.
        options: of the predictions.
        reading: columns of the data; default those of the training data, where they are there.
        writing: of answers, for a run that writes text.
        predictions: what was predicted of records in scope elsewhere.
        ood: out-of-scope records, labels not needed; adds how many of them are flagged. With --predictions a file of
            predictions too, whose targets say nothing.
        risk: largest share of errors among the answers.
        confidence: probability that the share is no larger.
        coverage: share of label sets that hold the right label, of intervals that hold the right value, or of
            the inputs that have a label for which it is named.
        label_sets: `lac` for the smallest sets, `aps` for sets that grow where the model is less sure, `raps` between.
        false_alarm: share of inputs in scope that are flagged as out of it.
        score: what flags them; default `mahalanobis`, the distance from the training records, where the run knows it
            (under a head of class means, and after `evaluate --distances`), `std` of values, `mutual_information` where
            a Gaussian head gives labels, and `predictive_entropy` else.
        matcher: of answers, as for `bloblora correctness`.
        by: what decides whether to withhold a text: `p_correct`, as `bloblora correctness` fitted it, or one of the
            scores of `generate`, such as `sequence_log_probability`.
        output: write the rules also to this JSON file.
        json: print JSON: what the rules are for, their thresholds and promises.
        device: `cpu`, `cuda`, `cuda:N` or `mps`; default the GPU where there is one.
    """
    use_device(device)
    runs.check_alone("calibrate")
    check_files({"output": output}, {"data": data, "predictions": predictions, "ood": ood})
    if output and directory and Path(output).absolute() == (Path(directory) / DECISION_FILE).absolute():
        there = "the rules are saved there anyway, and for other N beside; leave it out"
        raise RunError(f"output {quoted(output)}: {there}")
    promises: dict[str, Any] = {"risk": risk, "level": confidence, "coverage": coverage, "false_alarm": false_alarm}
    kinds: dict[str, Any] = {"kind": label_sets, "score": score}
    description = opened(directory, options) if directory is not None else None
    bars = sys.stdout.isatty() and not json
    if description is not None and description.task.kind == "generation":
        given: dict[str, Any] = {"predictions": predictions, "ood": ood, "approximate": options.approximate}
        given |= {
            "label-sets": changed(kind=label_sets),
            "score": score,
            "false-alarm": changed(false_alarm=false_alarm),
        }
        if data is None or any(given.values()):
            wrong = ", ".join(f"--{name}" for name, value in given.items() if value) or "nothing"
            raise RunError(f"a run that writes text is calibrated on --data FILE, and with nothing else; got {wrong}")
        del promises["false_alarm"]
        names = ("samples", "seed", "batch_size", "trust_remote_code")
        written = GenerationOptions(**{name: getattr(options, name) for name in names}, **asdict(writing))
        how = {"matcher": matcher, "by": by, **promises}
        calibrated = partial(_calibrate_texts, description, data, reading, written, bars, **how)
    elif of_texts := _changed_of_texts(writing, matcher, by):
        raise RunError(f"{', '.join(of_texts)}: only for a run that writes text; leave it out")
    elif predictions is not None:
        file, how = Path(predictions), promises | kinds
        calibrated = partial(_calibrate_predictions, file, description, options, data, ood, reading, **how)
    elif description is None or data is None:
        missing = "the folder of a run" if description is None else "--data FILE"
        raise RunError(f"calibrate needs {missing}, or --predictions FILE; see bloblora calibrate --help")
    else:
        calibrated = partial(_calibrate, description, data, ood, reading, options, bars, **promises, **kinds)
    with runs.alone(Path(output)) if output is not None else nullcontext():
        content = calibrated()
        if output is not None:
            DECISIONS.write(Path(output), [content])
    if json:
        print(dumped(content))
        return
    _say_promises(content)
    if directory is not None:
        of_text = (content.get("text") or {}).get("of")
        print(f"saved to {Path(directory) / DECISION_FILE}; next: {after_calibration(directory, of_text)}")


def _say_promises(content: dict[str, Any]) -> None:
    """What is promised, what isn't and why, and what became of it on the records that it was fitted on."""
    for name, promise in content["promises"].items():
        print(f"{name.replace('_', ' ')}: {promise}")
    for name, why in content["decision"].get("refused", {}).items():
        print(f"{name.replace('_', ' ')}: not promised, and left out: {why}")
    Console().print(realized(content["decision"], content["realized"], "on the calibration records"))


def _calibrate(
    description: RunDescription,
    data: str,
    ood: str | None,
    reading: ReadingOptions,
    options: PredictionOptions,
    progress: bool,
    **promises: Any,
) -> dict[str, Any]:
    """`calibrate` of a run that predicts."""
    records, outside = read_for(description, data, ood, reading)
    return calibrate_run(description, records, outside, options, progress=progress, **promises)


def _changed_of_texts(writing: WritingOptions, matcher: str, by: str) -> list[str]:
    """The options of `calibrate` for texts that were given."""
    own, usual = {"matcher": matcher, "by": by}, signature(calibrate).parameters
    defaults = asdict(WritingOptions()) | {name: usual[name].default for name in own}
    given = asdict(writing) | own
    return [f"--{name.replace('_', '-')}" for name, value in given.items() if value != defaults[name]]


def _calibrate_texts(
    description: RunDescription,
    data: str,
    reading: ReadingOptions,
    options: GenerationOptions,
    progress: bool,
    **promises: Any,
) -> dict[str, Any]:
    """`calibrate` of a run that writes text."""
    with named(data):
        records = read_records(data, reading, known=description.known)
        settings: dict[str, Any] = {"batch_size": options.batch_size, "progress": progress}
        settings["trust_remote_code"] = options.trust_remote_code
        return promise_texts(description, records, options.how(), **settings, **promises, **options.of_generation())


def _calibrate_predictions(
    file: Path,
    description: RunDescription | None,
    options: PredictionOptions,
    data: str | None,
    ood: str | None,
    reading: ReadingOptions,
    **promises: Any,
) -> dict[str, Any]:
    """`calibrate` on predictions that are at hand, of a run or of any other model."""
    task, right, positions = description.task if description else None, None, None
    if data is not None:
        records = read_records(data, reading, known=description.known if description else Known())
        right = [answer_of(record, task) for record in records]
        warn_of_copies([unanswered(record) for record in records])
    if description is not None:
        check_made_by(file, description, options)
        if data is not None:
            positions = unseen(description, records)
        else:
            positions = unseen_predictions(description, file, predicted_records(file, description.task))
    inside, targets = read_predictions(file, task, options.samples, targets=right, positions=positions)
    score = promises["score"]
    if score in inside.uncertainties and getattr(inside, score).isnan().any():
        raise RunError(f"{file}: field {score!r}: missing; give it, or take --score {inside.usual_score}")
    if marked := count_outside(file):
        use = "are taken as out of scope" if ood is None else "are left out, because of --ood"
        log.info(f"{file}: {marked} lines of inputs out of scope, marked so by `bloblora evaluate --ood`, {use}")
    outside, source = None, Path(ood) if ood is not None else file if marked else None
    if source is not None:
        only = count_outside(source) > 0
        outside, _ = read_predictions(source, task, options.samples, labelled=False, outside=only)
    check_promises(len(targets), predicted=type(inside), **promises)
    return calibrate_on(inside, targets, outside, description, options, **promises)
