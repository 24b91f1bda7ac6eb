"""Does the memory of `bloblora score` grow with the file?

    python benchmarks/scoring_memory.py runs/answers

The run is one that writes text. Files of additions with their sums (text_scores.py) are scored by the command, each in
a process of its own, of which the peak of the resident memory is read. Writes results/scoring_memory/.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import alone, keep, kept, parser_of
from text_scores import additions_and_dates

from bloblora import evaluation
from bloblora.files import write_text
from bloblora.studies.job import machine


def scored(run: str, lines: int, samples: int) -> dict[str, float]:
    """Peak memory and time of the command over a file of so many lines."""
    with tempfile.TemporaryDirectory() as place:
        records = ({key: record[key] for key in ("prompt", "response")} for record in additions_and_dates(lines))
        source, output = Path(place, "texts.jsonl"), Path(place, "scores.jsonl")
        write_text(source, "".join(json.dumps(record) + "\n" for record in records))
        command = [sys.executable, "-m", "bloblora", "score", run, "--input", str(source), "--output", str(output)]
        start = time.perf_counter()
        subprocess.run([*command, "--samples", str(samples)], check=True)
        seconds = time.perf_counter() - start
        if (found := sum(1 for _ in output.open())) != lines:
            raise SystemExit(f"{found} lines were scored, not {lines}")
    return {"peak MiB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, "minutes": seconds / 60}


def main() -> None:
    """Measure what is missing, write, print."""
    parser = parser_of(__doc__, "scoring_memory")
    parser.add_argument("run", help="folder of a run that writes text")
    parser.add_argument("--lines", type=int, nargs="+", default=[300, 1000, 3000, 10_000])
    parser.add_argument("--samples", type=int, default=2, help="weight samples N")
    options = parser.parse_args()
    results = kept(options.results) or {"machine": machine(), "samples": options.samples, "files": {}}
    for lines in options.lines:
        name = f"{lines} lines"
        if name not in results["files"]:
            results["files"][name] = alone(scored, options.run, lines, options.samples)
        text = (
            f"# Memory of `bloblora score`\n\nMade by `python benchmarks/scoring_memory.py RUN`, N = {options.samples}."
        )
        text += "\n\n" + evaluation.markdown_table(results["files"], ["peak MiB", "minutes"])
        keep(options.results, results, text)
    print(text)


if __name__ == "__main__":
    main()
