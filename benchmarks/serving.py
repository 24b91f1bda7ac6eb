"""How many requests a second does `bloblora serve` answer, and how long does each take?

    python benchmarks/serving.py runs/demo/blob
    python benchmarks/serving.py runs/demo/blob --minutes 10 --batches 16 --samples 10

For each largest batch and each N a server is started, and locust's users post one input a request, each as soon as it
has its answer. Measured: requests a second, quantiles of their time, errors, the mean batch, and the server's resident
memory from second to second. The client runs on the same machine and takes its share of it.

Writes results/serving/results.json and README.md.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import torch
from common import keep, parser_of

from bloblora import evaluation
from bloblora.data import read_records
from bloblora.files import write_text
from bloblora.runs import open_run
from bloblora.studies.job import machine

USER = Path(__file__).with_name("serving_user.py")
WARM_UP = 3


@contextmanager
def server(runs: Sequence[str], batch_size: int, samples: int) -> Iterator[str]:
    """The URL of a server of runs."""
    options = {"port": 0, "batch-size": batch_size, "samples": samples, "drain-seconds": 0.0}
    command = [
        sys.executable,
        "-m",
        "bloblora",
        "serve",
        *runs,
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            url = next((line.split()[-1] for line in process.stdout if line.startswith("serving on ")), None)
            if url is None:
                raise SystemExit("the server didn't start")
            yield url
        finally:
            process.send_signal(signal.SIGTERM)


def load(url: str, bodies: Path, users: int, seconds: int) -> tuple[dict[str, Any], list[float]]:
    """What locust found, and the server's memory (MiB) each second meanwhile."""
    command = [sys.executable, "-m", "locust", "-f", str(USER), "--headless", "--json", "--only-summary", "-H", url]
    command += ["-u", str(users), "-r", str(users), "-t", f"{seconds}s", "--loglevel", "ERROR"]
    environment = os.environ | {"SERVING_BODIES": str(bodies)}
    memory = []
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        while process.poll() is None:
            memory.append(metric(url, "process_resident_memory_bytes") / 2**20)
            time.sleep(1)
        assert process.stdout is not None
        found = json.loads(process.stdout.read())
    if not found:
        raise SystemExit(f"no request was answered in {seconds} s; give more --seconds")
    return found[0], memory


def metric(url: str, name: str) -> float:
    """Sum of a metric of the server over its labels."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def quantile(times: dict[str, int], share: float) -> float:
    """The time (ms) within which a share of the requests was answered; times over 100 ms have two digits."""
    left = share * sum(times.values())
    for milliseconds, count in sorted((float(time_), count) for time_, count in times.items()):
        left -= count
        if left <= 0:
            return milliseconds
    raise ValueError("there are no times")


def measure(run: str, bodies: Path, batch_size: int, samples: int, users: int, seconds: int) -> dict[str, Any]:
    """One case."""
    with server([run], batch_size, samples) as url:
        for body in bodies.read_text(encoding="utf-8").splitlines()[:WARM_UP]:
            httpx.post(f"{url}/v1/predict", json=json.loads(body), timeout=60).raise_for_status()
        found, memory = load(url, bodies, users, seconds)
        inputs, batches = (metric(url, f"bloblora_batch_size_{part}") - WARM_UP for part in ("sum", "count"))
    times = found["response_times"]
    return {
        "requests": found["num_requests"],
        "errors": found["num_failures"],
        "requests a second": found["num_requests"] / seconds,
        **{f"p{share * 100:.0f}, ms": quantile(times, share) for share in (0.5, 0.95, 0.99)},
        "mean batch": inputs / batches,
        "memory, MiB": memory,
    }


def main() -> None:
    """Measure, write, print."""
    parser = parser_of(__doc__, "serving")
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--data", default="support_desk:test", help="records of the run's kind")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--samples", type=int, nargs="+", default=[0, 10])
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=30, help="of each case, after a warm-up")
    parser.add_argument("--minutes", type=int, default=0, help="instead of seconds")
    options = parser.parse_args()
    if find_spec("locust") is None:
        parser.error("locust is not installed: pip install '.[load]'")
    seconds = options.minutes * 60 or options.seconds
    config = open_run(options.run).config
    results: dict[str, Any] = {
        "options": {"data": options.data, "users": options.users, "seconds": seconds},
        "run": {"method": config.method["name"], "model": config.model},
        "machine": {
            **machine(),
            "load average before": os.getloadavg()[0],
        },
        "cases": {},
    }
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        bodies = Path(folder) / "bodies.jsonl"
        fields = ("text", "question", "choices")
        records = [{k: v for k, v in record.items() if k in fields} for record in read_records(options.data)]
        write_text(bodies, "".join(json.dumps({"inputs": record}) + "\n" for record in records))
        for samples in options.samples:
            for batch_size in options.batches:
                found = measure(options.run, bodies, batch_size, samples, options.users, seconds)
                case = f"N = {samples}, batch_size {batch_size}"
                memory = found["memory, MiB"]
                results["cases"][case] = found
                rows[case] = found | {"memory, MiB": memory[0], "at the end": memory[-1]}
                print(case, rows[case], flush=True)
    text = (
        "# Load on `bloblora serve`\n\n"
        f"Made by `python benchmarks/serving.py RUN`; {options.users} users, one input a request, {seconds} s a case, "
        f"{config.method['name']} on {config.model}, {torch.get_num_threads()} thread(s). The client runs on the same "
        f"machine, whose load average before was {results['machine']['load average before']:.1f}. Options, machine "
        "and the memory of each second are in results.json.\n\n"
    )
    table = evaluation.markdown_table(rows, [*next(iter(rows.values()))])
    keep(options.results, results, text + table)


if __name__ == "__main__":
    main()
