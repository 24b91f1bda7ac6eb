"""Predict and evaluate with a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import evaluation, runs
from ..data import ReadingOptions, read_batches
from ..messages import quoted
from ..prediction.kinds import CLASSES
from ..runs import PredictionOptions, RunError
from ..runs.decide import open_decision
from ..runs.evaluate import METRICS_FILE, read_metrics, save_metrics
from ..runs.processes import use_device
from ..runs.seen import said, seen
from .common import check_files, dumped, opened, read_for, realized, write_described


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
    check_files({"output": output}, {"input": input})
    description = opened(directory, options)
    decision = open_decision(description, options)
    batches = runs.share_of(read_batches(input, runs.CHUNK, reading, known=description.known, require_labels=False))

    def load() -> runs.Run:
        return runs.load_run(description, options.approximate, trust_remote_code=options.trust_remote_code)

    def lines(run: runs.Run, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        return runs.describe(run, records, options, decision)

    write_described(input, output, batches, partial(runs.check_kind, description.task), load, lines)


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
    check_files({"output": output, "predictions": predictions, "diagram": diagram}, {"data": data, "ood": ood})
    with ExitStack() as stack:
        for file in {file for file in (output, diagram) if file}:  # predictions have their lock where they are written
            stack.enter_context(runs.alone(Path(file)))
        description = opened(directory, options)
        if diagram is not None and description.task.family.name not in CLASSES:
            name = description.task.name
            raise RunError(f"diagram: accuracy against confidence is of classes and choices; the run's task is {name}")
        if output and Path(output).absolute() == (description.folder / METRICS_FILE).absolute():
            there = "metrics are written there anyway, those of other data too; leave it out"
            raise RunError(f"output {quoted(output)}: {there}")
        if not description.remote:
            read_metrics(description.folder)  # what is added to must be readable
        records, outside = read_for(description, data, ood, reading)
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
                Console().print(realized(decision.to_dict(), result, "decisions"))
