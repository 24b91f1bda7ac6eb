"""Scores of a whole file of texts, which a stop doesn't lose."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import models
from ..data import MappedRows, write_rows
from ..decision import Correctness, Decision
from ..files import json_sha256
from .checks import check_generates
from .folder import RunDescription, alone, read_fields, records_sha256
from .lines import lines_file, write_table
from .predictions import state_of
from .processes import append_lines
from .run import Run, load_run
from .texts import response_examples


def score_file(
    description: RunDescription,
    records: Iterable[dict[str, Any]],
    output: Path,
    how: dict[str, Any],
    *,
    claims: str | None = None,
    correctness: Correctness | None = None,
    decision: Decision | None = None,
    batch_size: int = 16,
    trust_remote_code: bool = False,
) -> None:
    """Write the lines of `Run.describe_scores`, from where an earlier call was stopped; memory holds 256 texts.

    All that can be wrong with the records is looked at before the model is loaded.

    Args:
        description: of the run.
        records: each with a response.
        output: JSON lines, with what they depend on in ``<output>.meta.json``; or a table, .csv or .tsv by its name.
        how: ``num_samples`` and ``seed``.
        claims: ``sentences``, or None for those that records have.
        correctness: adds ``p_correct``.
        decision: adds ``abstain`` and ``promises``.
        batch_size: texts a forward.
        trust_remote_code: as of `load_run`.

    Raises:
        RunError: the run isn't of text, records are of another kind, or ``output`` holds something else.
        DataError: records that can't be used.
        TaskError: of responses that are missing or too long.
    """
    with TemporaryDirectory() as scratch:
        write_rows(Path(scratch) / "records.arrow", map(_used, records))
        rows = MappedRows(Path(scratch) / "records.arrow")
        check_generates(description.task, rows)
        description.check_base()
        tokenizer = models.load_tokenizer(description.config.model, trust_remote_code=trust_remote_code)
        for _ in response_examples(description.task, rows, tokenizer, claims):
            pass
        also = {name: [row.get(name) for row in rows] for name in ("claims", "id")}
        identity = {**state_of(description), **how, "records_sha256": records_sha256(rows)}
        identity["lines_sha256"] = json_sha256({**also, "claims_by": claims})
        for name, rules in (("correctness", correctness), ("decision", decision)):
            identity[f"{name}_sha256"] = None if rules is None else json_sha256(rules.to_dict())
        run: list[Run] = []

        def described(chunk: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
            run[:] = run or [load_run(description, trust_remote_code=trust_remote_code)]
            options: dict[str, Any] = {"claims": claims, "correctness": correctness, "decision": decision}
            return run[0].describe_scores(chunk, how["num_samples"], how["seed"], batch_size=batch_size, **options)

        lines = lines_file(output)
        with nullcontext() if lines == output else alone(output):
            append_lines(lines, rows, described, identity)
            if lines != output:
                write_table(lines, output)
                for file in (lines, lines.with_name(f"{lines.name}.meta.json")):
                    file.unlink()


def _used(record: dict[str, Any]) -> dict[str, Any]:
    """What is read of a record; its other columns may be of types that JSON lacks."""
    return read_fields(record) | {name: record[name] for name in ("id", "claims") if name in record}
