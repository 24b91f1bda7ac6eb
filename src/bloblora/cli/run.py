"""One run: train, calibrate, evaluate, predict, generate, score, correctness."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.table import Table

from .. import evaluation, models, runs
from ..adapter import find_posterior
from ..data import Known, Reader, ReadingOptions, read_batches, read_records, unanswered
from ..decision import MAPS, changed, check_promises
from ..decision.conformal import Kind, Score
from ..files import replacing
from ..messages import quoted
from ..prediction.kinds import CLASSES
from ..runs import CodeOptions, PredictionOptions, RunConfig, RunDescription, RunError, open_run
from ..runs.checks import check_generates, warn_of_copies
from ..runs.correctness import CORRECTNESS_FILE, calibrate_texts, open_correctness
from ..runs.decide import DECISION_FILE, DECISIONS, calibrate_on, open_decision
from ..runs.decide import calibrate as calibrate_run
from ..runs.evaluate import METRICS_FILE, read_metrics, save_metrics
from ..runs.lines import lines_file, write_table
from ..runs.outcome import log
from ..runs.predictions import answer_of, check_made_by, count_outside, predicted_records, read_predictions
from ..runs.processes import use_device
from ..runs.run import SamplingOptions
from ..runs.scoring import score_file
from ..runs.seen import said, seen, unseen, unseen_predictions
from ..runs.text_decisions import open_text_decision, promise_texts
from ..runs.texts import WritingOptions, response_examples
from ..training import PosteriorHistograms
from .following import after_calibration, after_training


def dumped(content: Any) -> str:
    """JSON as people read it."""
    return jsonlib.dumps(content, indent=2, ensure_ascii=False)


def train(
    config: RunConfig,
    code: CodeOptions,
    json: bool = False,
    tensorboard: str | None = None,
    device: str | None = None,
) -> None:
    """Fine-tune a base model on labelled data, as a Bayesian LoRA or a plain one.

    A record of the data is a text to classify or to give a number, a question with choices, or a prompt with a
    response; a file holds one of these kinds:
      {"text": "where is my parcel", "label": "track_order"}
      {"text": "the parcel came a week late", "value": 2.5}
      {"text": "the parcel came late and was broken", "labels": ["late", "damaged"]}
      {"question": "Which gas do plants take in?", "choices": ["oxygen", "carbon dioxide"], "answer": 1}
      {"prompt": "Question: Which gas do plants take in?\\nAnswer:", "response": "carbon dioxide"}
      {"prompt": "How do I return it?", "chosen": "Use the label in the box.", "rejected": "No."}
    `answer` is the right choice's index, counted from 0. Tables have the same columns, choices as choice_0, choice_1, …
    Columns of other names are found where that is obvious, or named by --text-column, --label-column, …

    Options are named as in peft.LoraConfig and transformers.TrainingArguments; --method NAME --help shows those of
    another method. The output folder then holds the adapter, task.json, run.json and config.yaml (for --config). A run
    that was stopped continues from its last checkpoint when the same command is given again. --preset paper takes the
    settings of the BLoB paper; options given beside it win. Where `accelerate launch` or `torchrun` started several
    processes, each takes a batch of --batch-size, and the first prints and writes.

    Examples:
      bloblora train --data queries.jsonl --output runs/desk
      bloblora train --data support_desk --method lora --output runs/desk-lora
      bloblora train --data arc_easy --limit 640 --steps 1000 --output runs/arc --preset paper
      bloblora train --config runs/desk/config.yaml --seed 1 --output runs/desk-1

    Args:
        config: of the run.
        code: of the base model.
        json: print JSON.
        tensorboard: folder for TensorBoard: the losses, and histograms of the posterior's Ω, M and |M|/Ω.
        device: `cpu`, `cuda`, `cuda:N` or `mps`; default the GPU where there is one.
    """
    use_device(device)
    callbacks = _histograms(tensorboard) if tensorboard else ()
    run = runs.train(config, callbacks=callbacks, trust_remote_code=code.trust_remote_code)
    if not runs.processes().is_main_process:
        return
    summary = posterior_summary(run)
    if json:
        print(dumped({"output": config.output, **run.training, "posterior": summary}))
        return
    final = run.training["final"]
    print(f"trained {config.method['name']} in {run.training['seconds']:.0f} s: training NLL {final['nll']:.4f}")
    if summary:
        kl = f", KL {summary['kl']:.0f} nats" if "kl" in summary else ""
        print(f"posterior: median Ω {summary['median_std']:.4f}{kl}")
    if rescaling := run.training.get("rescaling"):
        print(_rescaled(rescaling))
    if validation := run.training.get("validation"):
        print(_validated(validation))
    for num_samples, values in run.training.get("held_out", {}).get("by_num_samples", {}).items():
        shown = ", ".join(f"{name} {evaluation.metric_number(name, value, '.4f')}" for name, value in values.items())
        print(f"held out, {'mean weights' if num_samples == '0' else f'N = {num_samples}'}: {shown}")
    print(f"saved to {config.output}; next: {after_training(config, run.task)}")


def posterior_summary(run: runs.Run) -> dict[str, float] | None:
    """How far a run's Gaussian has moved; against a prior only where it was trained against one. None without one."""
    if (posterior := find_posterior(run.model)) is None:
        return None
    summary = posterior.summary()
    final = run.training.get("final")  # an imported one has none, and was trained against its prior
    if final is not None and "kl" not in final:
        summary = {name: value for name, value in summary.items() if "kl" not in name and name != "share_at_prior"}
    return summary


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
    _check_files({"output": output}, {"data": data, "predictions": predictions, "ood": ood})
    if output and directory and Path(output).absolute() == (Path(directory) / DECISION_FILE).absolute():
        there = "the rules are saved there anyway, and for other N beside; leave it out"
        raise RunError(f"output {quoted(output)}: {there}")
    promises: dict[str, Any] = {"risk": risk, "level": confidence, "coverage": coverage, "false_alarm": false_alarm}
    kinds: dict[str, Any] = {"kind": label_sets, "score": score}
    description = _opened(directory, options) if directory is not None else None
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
    Console().print(_realized(content["decision"], content["realized"], "on the calibration records"))


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
    records, outside = _read(description, data, ood, reading)
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
    with _named(data):
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


def evaluate(
    directory: str,
    data: str,
    options: PredictionOptions,
    reading: ReadingOptions,
    ood: str | None = None,
    output: str | None = None,
    predictions: str | None = None,
    diagram: str | None = None,
    distances: bool = False,
    json: bool = False,
    device: str | None = None,
) -> None:
    """Measure accuracy and calibration of a run on labelled data.

    Of a run that predicts values the table has the NLL (nats, of values in units of the training values' standard
    deviation), RMSE, MAE, CRPS, and coverage and mean width of the 90 % intervals. Of one with several labels at once
    it has the NLL (sum over the labels), micro and macro F1, the share of inputs whose labels are all right, and Brier
    score and ECE as means over the labels. Of one that tags words it has the NLL (sum over the words, and of a word),
    accuracy and ECE of words, and precision, recall, F1 and ECE of entities. Of one with labels or choices it is as
    follows.

    Prints a table of accuracy, ECE (mean distance of confidence and accuracy), ECE floor (the ECE that a perfectly
    calibrated model would have on the same records; "at floor" where yours is no more than two standard deviations
    above it), CE² (squared calibration error without the bias of few records; around 0, also below it, for a calibrated
    model), NLL (nats) and Brier score, and writes them to metrics.json in the run's folder, an entry for each data set
    and number of samples, from which `bloblora card` takes them, and to --output as JSON. With --ood also the AUROC,
    how well confidence, predictive entropy, mutual information and, where the run knows it, the distance from the
    training records tell the two data sets apart: 1 is perfect, 0.5 is chance. Of a calibrated run also the share
    answered, the selective risk (errors among the answers), the coverage and mean size of the label sets, and the rates
    of false alarms and, with --ood, of detection. With --predictions a stop loses little: the same command continues
    from what is in that file.

    Examples:
      bloblora evaluate runs/desk --data held_out.jsonl --output metrics.json
      bloblora evaluate runs/desk --data support_desk:test --ood support_desk:out_of_scope --diagram reliability.png

    Args:
        directory: folder of a run.
        data: labelled records, in the forms that `train` takes.
        options: of the predictions.
        reading: columns of the data; default those of the training data, where they are there.
        ood: out-of-scope records, labels not needed; adds the AUROC of telling them from `data`.
        output: write the metrics also to this JSON file.
        predictions: write what `predict` says of each record to this file, 256 at a time; FILE.meta.json beside it says
            of which run, records, samples and seed.
        diagram: write a reliability diagram (accuracy against confidence) to this PNG, and a copy for the card into the
            run's folder where it is elsewhere.
        distances: where the run doesn't know the distance of what its head reads from what it read of the training
            records, as it does under a head of class means: fit it on these records, and save it in the run's folder.
            All predictions have it from then on.
        json: print JSON instead of a table.
        device: `cpu`, `cuda`, `cuda:N` or `mps`; default the GPU where there is one.
    """
    use_device(device)
    # All that can be wrong is looked at before the base model is loaded.
    runs.check_alone("evaluate")
    _check_files({"output": output, "predictions": predictions, "diagram": diagram}, {"data": data, "ood": ood})
    with ExitStack() as stack:
        for file in {file for file in (output, diagram) if file}:  # predictions have their lock where they are written
            stack.enter_context(runs.alone(Path(file)))
        description = _opened(directory, options)
        if diagram is not None and description.task.family.name not in CLASSES:
            name = description.task.name
            raise RunError(f"diagram: accuracy against confidence is of classes and choices; the run's task is {name}")
        if output and Path(output).absolute() == (description.folder / METRICS_FILE).absolute():
            there = "metrics are written there anyway, those of other data too; leave it out"
            raise RunError(f"output {quoted(output)}: {there}")
        if not description.remote:
            read_metrics(description.folder)  # what is added to must be readable
        records, outside = _read(description, data, ood, reading)
        decision = open_decision(description, options)
        unfitted = distances and runs.open_distance(description) is None
        training = runs.training_records(description) if unfitted else None
        run = runs.load_run(description, options.approximate, trust_remote_code=options.trust_remote_code)
        if num_seen := len(seen(description, records)):
            of_all = said(num_seen, len(records))
            print(f"data {quoted(data)}: {of_all}; its metrics on them say little of others", file=sys.stderr)
        bars = sys.stdout.isatty() and not json  # the bar goes to standard output
        if training is not None:
            runs.fit_distance(run, description, training, batch_size=options.batch_size, progress=bars)
        result = runs.evaluate(
            run,
            records,
            outside,
            options,
            progress=bars,
            diagram=Path(diagram) if diagram else None,
            decision=decision,
            predictions=Path(predictions) if predictions else None,
        )
        if output:
            runs.write_json(Path(output), result)
        if not description.remote:
            try:
                save_metrics(description, result, options, data, ood, Path(diagram) if diagram else None)
            except OSError as error:  # a folder that others share, for reading
                print(f"metrics aren't in the run's folder, which can't be written: {error}", file=sys.stderr)
        if json:
            print(dumped(result))
        else:
            name = f"{description.method.name}, N = {result['num_samples']}"
            Console().print(evaluation.rich_table({name: result}, title=f"{data}, {result['num_examples']} examples"))
            if decision:
                Console().print(_realized(decision.to_dict(), result, "decisions"))


def predict(
    directory: str,
    input: str,
    options: PredictionOptions,
    reading: ReadingOptions,
    output: str | None = None,
    device: str | None = None,
) -> None:
    """Write a JSON line for each input: label, probabilities, confidence and uncertainty.

    Of a run that predicts values a line has `value` (the predictive mean), `std` (its standard deviation), of it
    `aleatoric_std` (what the input leaves open) and `epistemic_std` (what the model doesn't know), `interval` (90 % of
    the predictive probability), and after `bloblora calibrate` `promised_interval`. Of
    one with several labels at once it has `labels` (more probable than not), `probabilities`, the entropies, and then
    `promised_labels`. Of one that tags words it has `tags`, `entities` with their `probability`, uncertainty of each
    word and of the text, and then `tag_sets`. With labels or choices:

    A line has, in the inputs' order: `label`, `probabilities` (by label, or by choice), `confidence` (of that label),
    `predictive_entropy` (all uncertainty, nats) and of it `mutual_information` (what the model doesn't know; 0 for a
    plain LoRA, and for a single weight sample, which can't tell) and `expected_entropy` (what the input leaves open);
    and, where the run knows it, `mahalanobis` (squared distance from the training records, in standard deviations) and
    `relative_mahalanobis` (less that from all of them together).
    Of a run that `bloblora calibrate` was given also `decision` (`answer` or `abstain`), `label_set` (the most probable
    first) and `out_of_scope`. Memory holds 256 inputs at a time. Where `accelerate launch` or `torchrun` started
    several processes, they share the inputs; under FSDP each holds a part of the model, and they answer together.

    Examples:
      bloblora predict runs/desk --input queries.jsonl --output answers.jsonl
      echo '{"text": "where is my parcel"}' | bloblora predict runs/desk --input -

    Args:
        directory: folder of a run.
        input: records in the forms that `train` takes, labels not needed; `-` reads JSON lines from standard input and
            answers them as they come, 256 at a time.
        options: of the predictions.
        reading: columns of the data; default those of the training data, where they are there.
        output: file to write, which appears when it is complete; default standard output. A name that ends in .csv or
            .tsv makes it a table, with a column probability_LABEL for each label.
        device: `cpu`, `cuda`, `cuda:N` or `mps`; default the GPU where there is one.
    """
    use_device(device)
    several = runs.processes().num_processes > 1
    if several and (output is None or input == "-"):
        raise RunError("several processes share an input that is a file, and need --output for their answers")
    _check_files({"output": output}, {"input": input})
    description = _opened(directory, options)
    decision = open_decision(description, options)
    batches = runs.share_of(read_batches(input, runs.CHUNK, reading, known=description.known, require_labels=False))

    def load() -> runs.Run:
        return runs.load_run(description, options.approximate, trust_remote_code=options.trust_remote_code)

    def lines(run: runs.Run, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        return runs.describe(run, records, options, decision)

    _write(input, output, batches, partial(runs.check_kind, description.task), load, lines)


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
    _check_files({"output": output}, {"input": input})
    description = _opened(directory)
    correctness = open_correctness(description, "generate", options.how())
    decision = open_text_decision(description, "generate", options.how(), correctness)
    settings: dict[str, Any] = {"batch_size": options.batch_size, "correctness": correctness, "decision": decision}
    settings |= options.of_generation()
    batches = read_batches(input, 64, reading, known=description.known, require_labels=False)

    def load() -> runs.Run:
        return runs.load_run(description, trust_remote_code=options.trust_remote_code)

    def lines(run: runs.Run, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        return run.describe_texts(records, options.samples, options.seed, **settings)

    _write(input, output, batches, partial(check_generates, description.task), load, lines)


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
    _check_files({"output": output}, {"input": input})
    check_generates((description := _opened(directory)).task)
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
    _write(input, output, batches, check, partial(runs.load_run, description, **trusted), lines)


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
    check_generates((description := _opened(directory)).task)
    with _named(data):
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


def _rescaled(rescaling: dict[str, Any]) -> str:
    """T and τ, and what they changed on the records that they were fitted on."""
    of_mean = rescaling.get("temperature_of_mean")
    alone = "" if of_mean is None else f" (of the mean alone {of_mean:.3g})"
    width = f", scale of the width {rescaling['width']:.3g}" if "width" in rescaling else ""
    if rescaling.get("width") == 0:
        width += " (predictions are those of the mean, for any number of samples)"
    nll = f"NLL {rescaling['nll_before']:.4f} to {rescaling['nll']:.4f} on {rescaling['num_records']} records"
    return f"temperature {rescaling['temperature']:.3g}{alone}{width}: {nll}"


def _validated(validation: dict[str, Any]) -> str:
    """Which checkpoints were kept, and what finding them cost."""

    def measured(row: dict[str, Any]) -> str:
        accuracy = "" if row.get("accuracy") is None else f", accuracy {row['accuracy']:.3f}"
        return f"NLL {row['nll']:.4f}{accuracy}"

    parts = []
    for one in validation["trainings"]:
        name, last = (f"{one['part']} " if one["part"] else ""), one["curve"][-1]["step"]
        stopped = "stopped at" if one["stopped_early"] else "of"
        before = f" (before training: {measured(one['before'])})" if one["before"] else ""
        parts.append(f"{name}best at step {one['best_step']} ({stopped} {last}), {measured(one)}{before}")
    return f"validation: {'; '.join(parts)}; {validation['share_of_time']:.0%} of the time"


def _check_files(outputs: Mapping[str, str | None], inputs: Mapping[str, str | None]) -> None:
    """Raise a RunError for a file that can't be written, or is also read, or written for another option.

    And for two inputs of one stream.
    """
    if len(piped := [f"--{name}" for name, file in inputs.items() if file == "-"]) > 1:
        raise RunError(f"{' and '.join(piped)} '-': standard input is read once; give a file for one of them")
    others = {name: file for name, file in inputs.items() if file not in (None, "-")}
    for name, file in outputs.items():
        if file == "-":  # which as an input is no file of that name either
            raise RunError(f"--{name} '-': only an input can be so; leave it out, or give a file")
        for other, there in others.items():
            if file is not None and there is not None and _is_same(Path(file), Path(there)):
                raise RunError(f"--{name} {quoted(file)}: is the same file as --{other} {quoted(there)}; give another")
        if file is not None:
            runs.check_writable(file)
            others[name] = file


def _is_same(file: Path, other: Path) -> bool:
    return file.resolve() == other.resolve() or (file.exists() and other.exists() and file.samefile(other))


def _opened(directory: str, options: PredictionOptions | None = None) -> RunDescription:
    """The description of a run whose method allows the approximation; the warnings of its training are repeated."""
    description = open_run(directory)
    if options is not None:
        options.check(description.method, description.task)
    for problem in description.training.get("warnings", ()):
        log.warning(f"this run: {problem}")
    return description


def _histograms(folder: str) -> list[PosteriorHistograms]:
    runs.check_writable(Path(folder) / "events")
    try:
        return [PosteriorHistograms(folder)]
    except RuntimeError as error:
        raise RunError("tensorboard isn't installed: pip install 'bloblora[tensorboard]'") from error


def _read(
    description: RunDescription, data: str, ood: str | None, reading: ReadingOptions
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Labelled records in scope and records out of it, once they fit the run."""
    records = read_records(data, reading, known=description.known)
    known = replace(description.known, columns={**description.columns, **reading.columns()})
    skip = ReadingOptions(skip_invalid=reading.skip_invalid)
    outside = read_records(ood, skip, known=known, require_labels=False) if ood else None
    for source, side in ((data, records), (ood, outside)):
        with _named(source):
            if side is not None:
                runs.check_kind(description.task, side)
    with _named(data):
        runs.targets_of(description.task, records)
    return records, outside


@contextmanager
def _named(source: str | None) -> Iterator[None]:
    """Say which file an error is about."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{source}: {error}") from error


def _write(
    source: str,
    output: str | None,
    batches: Iterable[list[dict[str, Any]]],
    check: Callable[[list[dict[str, Any]]], None],
    load: Callable[[], runs.Run],
    describe: Callable[[runs.Run, list[dict[str, Any]]], Iterator[dict[str, Any]]],
) -> None:
    """Write a line for each record of ``source``; the run is loaded once the first batch has been checked."""
    run = None
    lines = None if output is None else lines_file(Path(output))
    with _alone(output, lines):
        with _writing(runs.part_of(lines) if lines else None) as handle:
            for records in batches:
                with _named(source):
                    check(records)
                run = run or load()
                _write_lines(handle, describe(run, records))
        if lines:
            runs.join_parts(lines)
            if runs.processes().is_main_process:
                _as_table(lines, output)


@contextmanager
def _alone(output: str | None, lines: Path | None) -> Iterator[None]:
    """The locks of what this process writes: its part of the lines, and where it is the first all that they become."""
    with ExitStack() as stack:
        if output and lines:
            joined = [Path(output), lines] if runs.processes().is_main_process else []
            for file in dict.fromkeys([*joined, runs.part_of(lines)]):
                stack.enter_context(runs.alone(file))
        yield


@contextmanager
def _writing(output: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears when it is complete."""
    if output is None:
        yield sys.stdout
        return
    with replacing(output) as partial, partial.open("w", encoding="utf-8") as handle:
        yield handle


def _as_table(lines: Path, output: str | None) -> None:
    """Make the table of its lines, and remove these, where the output is one."""
    if output is not None and lines != Path(output):
        try:
            write_table(lines, Path(output))
        finally:
            lines.unlink()


def _write_lines(handle: TextIO, lines: Iterator[dict[str, Any]]) -> None:
    for line in lines:
        handle.write(jsonlib.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    handle.flush()


def _realized(decision: dict[str, Any], result: dict[str, Any], title: str) -> Table:
    """What was promised and what became of it, of the rules that are there."""
    sets = {"answer_sets": "sets with a right answer", "tag_sets": "texts with all right tags in their sets"}
    of_sets = next((name for name in sets if name in decision), "label_sets")
    promised = {
        "selective_risk": ("answering", "≤", "risk"),
        "set_coverage": (of_sets, "≥", "coverage"),
        "false_alarm": ("scope", "≤", "false_alarm"),
        "promised_coverage": ("intervals", "≥", "coverage"),
        "recall": ("label_thresholds", "≥", "coverage"),
    }
    names = {
        "answered": "answered",
        "selective_risk": "errors among answers",
        "set_coverage": sets.get(of_sets, "sets with the right label"),
        "set_size": "tags a set" if of_sets == "tag_sets" else "labels a set",
        "false_alarm": "flagged in scope",
        "detection": "flagged out of scope",
        "promised_coverage": "intervals with the right value",
        "promised_width": "width of an interval",
        "recall": "labels named where they are right",
        "least_recall": "the same of the worst label",
        "named": "labels named",
    }
    table = Table("", "promised", "realized", title=title)
    for name in (name for name in names if name in result):
        rule, sign, option = promised.get(name, ("", "", ""))
        promise = f"{sign} {decision[rule][option]:.4g}" if rule else ""
        table.add_row(names[name], promise, evaluation.metric_number(name, result[name]))
    return table
