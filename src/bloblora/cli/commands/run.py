"""One run: train, calibrate, evaluate, predict."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from ... import evaluation, runs
from ...adapter import find_posterior
from ...data import read_batches, read_records
from ...decision import check_promises
from ...decision.conformal import Kind, Score
from ...runs import TrainConfig
from ...runs.decide import DECISION_FILE, open_decision
from ...runs.decide import calibrate as calibrate_run
from ...training import PosteriorHistograms
from .output import named, print_json, writing


def train(json: bool = False, tensorboard: str | None = None, **options: Any) -> None:
    """Fine-tune a base model on labelled data, as a Bayesian LoRA or a plain one.

    A record of the data is a text to classify, a question with choices, or a prompt with a response; a file holds one
    of these kinds:
      {"text": "where is my parcel", "label": "track_order"}
      {"question": "Which gas do plants take in?", "choices": ["oxygen", "carbon dioxide"], "answer": 1}
      {"prompt": "Question: Which gas do plants take in?\\nAnswer:", "response": "carbon dioxide"}
    `answer` is the right choice's index, counted from 0. Tables have the same columns, choices as choice_0, choice_1, …

    The output folder then holds the adapter, task.json, run.json and config.yaml (for --config). A run that was
    stopped goes on from its last checkpoint when the same command is given again. --preset paper takes the settings
    of the BLoB paper; options given beside it win. Where `accelerate launch` or `torchrun` started several processes,
    they share each batch, and the first prints and writes.

    Examples:
      bloblora train --data queries.jsonl --output runs/desk
      bloblora train --data support_desk --method lora --output runs/desk-lora
      bloblora train --data arc_easy --limit 640 --steps 1000 --output runs/arc --preset paper
      bloblora train --config runs/desk/config.yaml --seed 1 --output runs/desk-1

    Args:
        json: print JSON.
        tensorboard: folder for TensorBoard: the losses, and histograms of the posterior's Ω, M and |M|/Ω.
    """
    logging.disable_progress_bar()
    config = TrainConfig(**options)
    run = runs.train(config, callbacks=_histograms(tensorboard) if tensorboard else ())
    if not runs.processes().is_main_process:
        return
    posterior = find_posterior(run.model)
    result = {
        "output": run.config.output,
        **run.training,
        "posterior": posterior.summary() if posterior else None,
    }
    if json:
        print_json(result)
        return
    final = run.training["final"]
    print(f"trained {run.config.method} in {run.training['seconds']:.0f} s: training NLL {final['nll']:.4f}")
    if summary := result["posterior"]:
        print(f"posterior: median Ω {summary['median_std']:.4f}, KL {summary['kl']:.0f} nats")
    print(f"saved to {run.config.output}; next: bloblora evaluate {run.config.output} --data FILE")


def calibrate(
    directory: str,
    data: str,
    ood: str | None = None,
    risk: float = 0.05,
    confidence: float = 0.95,
    coverage: float = 0.9,
    label_sets: Kind = "lac",
    false_alarm: float = 0.05,
    score: Score = "predictive_entropy",
    samples: int = 10,
    seed: int = 0,
    batch_size: int = 32,
    approximate: str | None = None,
    json: bool = False,
) -> None:
    """Choose from held-out labelled data when to answer, which labels to name, and what to call out of scope.

    Three rules are saved in the run's folder as decision.json, each with what it promises on data like these:
      answer or abstain   at most --risk errors among the answers, with probability --confidence
      label set           at least --coverage of the sets hold the right label
      out of scope        at most --false-alarm of inputs in scope are flagged
    `predict` and `evaluate` use them from then on, with the same --samples, --seed and --approximate. Where the
    data can't carry a promise, that is an error, and nothing is saved. Data that the run was trained on make the
    promises worthless.

    Examples:
      bloblora calibrate runs/desk --data held_out.jsonl --risk 0.1
      bloblora calibrate runs/desk --data support_desk:validation --risk 0.2 --ood support_desk:out_of_scope

    Args:
        directory: folder of the run.
        data: labelled records in scope, in the forms that `train` takes, used for nothing else.
        ood: out-of-scope records, labels not needed; adds how many of them are flagged.
        risk: largest share of errors among the answers.
        confidence: probability that the share is no larger.
        coverage: share of label sets that hold the right label.
        label_sets: `lac` for the smallest sets, `aps` for sets that grow where the model is less sure, `raps` between.
        false_alarm: share of inputs in scope that are flagged as out of it.
        score: what flags them.
        samples: weight draws N; 0 is the posterior mean.
        seed: of the draws.
        batch_size: inputs a forward.
        approximate: save forwards at some loss (docs/cost.md): `mirrored` (draws in pairs about the mean; 2 do what
            several do), `linearized` (two passes, whatever N), `top-blocks:K` (draws in the last K blocks alone),
            `stop` (no more draws for an input whose answer is settled; `stop:ERROR:TOLERANCE`), or `mirrored-stop`
            (both; try it with N = 4).
        json: print JSON, what decision.json holds.
    """
    logging.disable_progress_bar()
    runs.check_samples(samples, seed, batch_size)
    runs.check_approximation(directory, approximate)
    runs.check_alone("calibrate")
    promises = {"risk": risk, "level": confidence, "coverage": coverage, "false_alarm": false_alarm}
    records, outside = _read(directory, data, ood)
    check_promises(len(records), **promises)
    if _is_training_data(directory, data):
        raise runs.RunError(f"data {data!r}: the run was trained on these; calibrate on records that it has not seen")
    content = calibrate_run(
        runs.load_run(directory, approximate),
        directory,
        records,
        outside,
        samples,
        seed,
        batch_size=batch_size,
        progress=sys.stdout.isatty() and not json,
        kind=label_sets,
        score=score,
        **promises,
    )
    if json:
        print_json(content)
        return
    for name, promise in content["promises"].items():
        print(f"{name.replace('_', ' ')}: {promise}")
    Console().print(_realized(content["decision"], content["realized"], f"{len(records)} calibration records"))
    print(f"saved to {Path(directory) / DECISION_FILE}; next: bloblora evaluate {directory} --data OTHER_FILE")


def evaluate(
    directory: str,
    data: str,
    ood: str | None = None,
    samples: int = 10,
    seed: int = 0,
    batch_size: int = 32,
    approximate: str | None = None,
    output: str | None = None,
    predictions: str | None = None,
    diagram: str | None = None,
    json: bool = False,
) -> None:
    """Measure accuracy and calibration of a run on labelled data.

    Prints a table of accuracy, ECE, NLL (nats) and Brier score, and writes them to --output as JSON, with
    num_examples and num_samples. With --ood also the AUROC, how well confidence, predictive entropy and mutual
    information tell the two data sets apart: 1 is perfect, 0.5 is chance. Of a calibrated run also the share answered,
    the selective risk (errors among the answers), the coverage and mean size of the label sets, and the rates of false
    alarms and, with --ood, of detection. With --predictions a stop loses little: the same command goes on from what is
    in that file.

    Examples:
      bloblora evaluate runs/desk --data held_out.jsonl --output metrics.json
      bloblora evaluate runs/desk --data support_desk:test --ood support_desk:out_of_scope --diagram reliability.png

    Args:
        directory: folder of the run.
        data: labelled records, in the forms that `train` takes.
        ood: out-of-scope records, labels not needed; adds the AUROC of telling them from `data`.
        samples: weight draws N; 0 is the posterior mean.
        seed: of the draws.
        batch_size: inputs a forward.
        approximate: save forwards at some loss (docs/cost.md): `mirrored` (draws in pairs about the mean; 2 do what
            several do), `linearized` (two passes, whatever N), `top-blocks:K` (draws in the last K blocks alone),
            `stop` (no more draws for an input whose answer is settled; `stop:ERROR:TOLERANCE`), or `mirrored-stop`
            (both; try it with N = 4).
        output: write the metrics to this JSON file.
        predictions: write what `predict` says of each record to this file, 256 at a time; FILE.meta.json beside it says
            of which run, records, samples and seed.
        diagram: write a reliability diagram (accuracy against confidence) to this PNG.
        json: print JSON instead of a table.
    """
    logging.disable_progress_bar()
    # All that can be wrong is looked at before the base model is loaded.
    runs.check_samples(samples, seed, batch_size)
    runs.check_approximation(directory, approximate)
    runs.check_alone("evaluate")
    for file in (output, predictions, diagram):
        if file is not None:
            runs.check_writable(file)
    records, outside = _read(directory, data, ood)
    decision = open_decision(directory, samples, seed, approximate)
    run = runs.load_run(directory, approximate)
    if _is_training_data(directory, data):
        print(f"data {data!r}: the run was trained on these; its metrics say little of others", file=sys.stderr)
    result = runs.evaluate(
        run,
        records,
        outside,
        samples,
        seed,
        batch_size=batch_size,
        progress=sys.stdout.isatty() and not json,  # the bar goes to standard output
        diagram=Path(diagram) if diagram else None,
        decision=decision,
        predictions=Path(predictions) if predictions else None,
    )
    if output:
        runs.write_json(Path(output), result)
    if json:
        print_json(result)
    else:
        name = f"{runs.open_run(directory).config.method}, N = {result['num_samples']}"
        Console().print(evaluation.rich_table({name: result}, title=f"{data}, {result['num_examples']} examples"))
        if decision:
            Console().print(_realized(decision.to_dict(), result, "decisions"))


def predict(
    directory: str,
    input: str,
    samples: int = 10,
    seed: int = 0,
    batch_size: int = 32,
    approximate: str | None = None,
    output: str | None = None,
) -> None:
    """Write a JSON line for each input: label, probabilities, confidence and uncertainty.

    A line has, in the inputs' order: `label`, `probabilities` (by label, or by choice), `confidence` (of that label),
    `predictive_entropy` (all uncertainty, nats) and of it `mutual_information` (what the model doesn't know, 0 for a
    plain LoRA) and `expected_entropy` (what the input leaves open). Of a run that `bloblora calibrate` was given also
    `decision` (`answer` or `abstain`), `label_set` (the most probable first) and `out_of_scope`. Memory holds 256
    inputs at a time. Where `accelerate launch` or `torchrun` started several processes, they share the inputs;
    under FSDP each holds a part of the model, and they answer together.

    Examples:
      bloblora predict runs/desk --input queries.jsonl --output answers.jsonl
      echo '{"text": "where is my parcel"}' | bloblora predict runs/desk --input -

    Args:
        directory: folder of the run.
        input: records in the forms that `train` takes, labels not needed; `-` reads JSON lines from standard input and
            answers them as they come, 256 at a time.
        samples: weight draws N; 0 is the posterior mean.
        seed: of the draws.
        batch_size: inputs a forward.
        approximate: save forwards at some loss (docs/cost.md): `mirrored` (draws in pairs about the mean; 2 do what
            several do), `linearized` (two passes, whatever N), `top-blocks:K` (draws in the last K blocks alone),
            `stop` (no more draws for an input whose answer is settled; `stop:ERROR:TOLERANCE`), or `mirrored-stop`
            (both; try it with N = 4).
        output: file to write, which appears when it is complete; default standard output.
    """
    logging.disable_progress_bar()
    runs.check_samples(samples, seed, batch_size)
    runs.check_approximation(directory, approximate)
    several = runs.processes().num_processes > 1
    if several and (output is None or input == "-"):
        raise runs.RunError("several processes share an input that is a file, and need --output for their answers")
    if output is not None:
        runs.check_writable(output)
    task = runs.open_run(directory).task
    decision = open_decision(directory, samples, seed, approximate)
    batches = read_batches(input, runs.CHUNK, require_labels=False)
    run = None
    with writing(str(runs.part_of(Path(output))) if output else None) as handle:
        for records in runs.share_of(batches):
            with named(input):
                runs.check_kind(task, records)
            run = run or runs.load_run(directory, approximate)
            for line in runs.describe(run, records, samples, seed, batch_size=batch_size, decision=decision):
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
            handle.flush()
    if output:
        runs.join_parts(Path(output))


def _is_training_data(directory: str, data: str) -> bool:
    return data.removesuffix(":train") == runs.open_run(directory).config.data.removesuffix(":train")


def _histograms(folder: str) -> list[PosteriorHistograms]:
    runs.check_writable(Path(folder) / "events")
    try:
        return [PosteriorHistograms(folder)]
    except RuntimeError as error:
        raise runs.RunError("tensorboard isn't installed: pip install 'bloblora[tensorboard]'") from error


def _read(directory: str, data: str, ood: str | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Labelled records in scope and records out of it, once they fit the run."""
    task = runs.open_run(directory).task
    records = read_records(data)
    outside = read_records(ood, require_labels=False) if ood else None
    for source, side in ((data, records), (ood, outside)):
        with named(source):
            if side is not None:
                runs.check_kind(task, side)
    with named(data):
        runs.targets_of(task, records)
    return records, outside


def _realized(decision: dict[str, Any], result: dict[str, Any], title: str) -> Table:
    """What was promised and what became of it."""
    answering, label_sets, scope = (decision[name] for name in ("answering", "label_sets", "scope"))
    rows = {
        "answered": ("answered", ""),
        "selective_risk": ("errors among answers", f"≤ {answering['risk']:.4g}"),
        "set_coverage": ("sets with the right label", f"≥ {label_sets['coverage']:.4g}"),
        "set_size": ("labels a set", ""),
        "false_alarm": ("flagged in scope", f"≤ {scope['false_alarm']:.4g}"),
        "detection": ("flagged out of scope", ""),
    }
    table = Table("", "promised", "realized", title=title)
    for name in (name for name in rows if name in result):
        table.add_row(*rows[name], f"{result[name]:.3f}")
    return table
