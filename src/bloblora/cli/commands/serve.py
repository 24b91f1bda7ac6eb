"""The command that answers over HTTP."""

import math

from transformers.utils import logging

from ... import runs


def serve(
    directories: list[str],
    host: str = "127.0.0.1",
    port: int = 8000,
    samples: int = 10,
    seed: int = 0,
    max_samples: int = 100,
    max_batch: int = 16,
    max_wait_ms: float = 5.0,
    queue: int = 256,
    max_inputs: int = 64,
    max_tokens: int = 1024,
    max_body_bytes: int = 1_000_000,
    api_key_file: str | None = None,
    drain_seconds: float = 2.0,
    approximate: str | None = None,
) -> None:
    """Answer over HTTP: POST /v1/predict, and a page at / to try it on.

    A run is called by its folder's name, or NAME=FOLDER says what it is called; weights that runs have in common are in
    memory once. Inputs of requests that come together share forwards. /v1/models, /health, /ready, /metrics
    (Prometheus) and /openapi.json say the rest; docs/serve.md has examples. SIGTERM or Ctrl-C finishes what is held.

    Examples:
      bloblora serve runs/desk
      bloblora serve runs/desk blue=runs/arc --port 8080 --api-key-file keys.txt
      curl localhost:8000/v1/predict --json '{"inputs": {"text": "where is my parcel"}}'

    Args:
        directories: folders of runs or hub:user/name, each alone or as NAME=FOLDER.
        host: address to listen on; 0.0.0.0 is every one of the machine's.
        port: to listen on; 0 lets the system choose.
        samples: weight draws N of a request that names none; 0 is the posterior mean.
        seed: of the draws.
        max_samples: largest N that a request may name.
        max_batch: inputs a forward.
        max_wait_ms: how long an input waits for others to share its forward, milliseconds.
        queue: most inputs that wait; beyond it requests get 429 and Retry-After.
        max_inputs: most inputs a request.
        max_tokens: most tokens an input, a question's choices included.
        max_body_bytes: largest body of a request.
        api_key_file: keys, one a line, of which a request must bring one as `Authorization: Bearer KEY`.
        drain_seconds: after SIGTERM, how long /ready says 503 before new connections are refused.
        approximate: save forwards at some loss (docs/cost.md): `mirrored` (draws in pairs about the mean; 2 do what
            several do), `linearized` (two passes, whatever N), `top-blocks:K` (draws in the last K blocks alone),
            `stop` (no more draws for an input whose answer is settled; `stop:ERROR:TOLERANCE`), or `mirrored-stop`
            (both; try it with N = 4).
    """
    logging.disable_progress_bar()
    try:
        from ...serving import Settings, bind, create_app, load_hosted, open_hosted, read_keys, run_server
    except ModuleNotFoundError as error:
        raise runs.RunError(f"serve needs {error.name}: pip install 'bloblora[serve]'") from error
    if not (math.isfinite(drain_seconds) and drain_seconds >= 0):
        raise runs.RunError(f"drain_seconds must be a finite number of at least 0, got {drain_seconds}")
    settings = Settings(
        samples=samples,
        seed=seed,
        max_samples=max_samples,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        queue=queue,
        max_inputs=max_inputs,
        max_tokens=max_tokens,
        max_body_bytes=max_body_bytes,
        approximate=approximate,
    )
    keys = read_keys(api_key_file) if api_key_file else ()
    folders = open_hosted(directories, settings)
    taken = bind(host, port)
    hosted = load_hosted(folders, settings)
    for name, run in hosted.items():
        total = sum(parameter.numel() for parameter in run.run.model.parameters())
        print(f"{name}: {run.run.config.method}, {total:,} parameters, {run.shared_parameters:,} of them shared")
    app = create_app(hosted, settings, keys)
    run_server(app, taken, drain_seconds, lambda url: print(f"serving on {url}", flush=True))
