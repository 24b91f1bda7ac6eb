"""The command that answers over HTTP."""

import math

from ..runs import RunError
from ..runs.processes import use_device

try:
    from ..serving import GRACE_SECONDS, Settings, bind, create_app, load_hosted, open_hosted, read_keys, run_server
except ModuleNotFoundError as error:
    raise RunError(f"serve needs {error.name}: pip install 'bloblora[serve]'") from error


def serve(
    directories: list[str],
    settings: Settings,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: str | None = None,
    allowed_hosts: str | None = None,
    drain_seconds: float = 2.0,
    grace_seconds: float = GRACE_SECONDS,
    device: str | None = None,
) -> None:
    """Answer over HTTP: POST /v1/predict, OpenAI's /v1/completions and /v1/chat/completions, and a page to try it on.

    A run is called by its folder's name, or NAME=FOLDER says what it is called; weights that runs have in common are in
    memory once. Inputs of requests that come together share forwards. /v1/models, /health, /ready, /metrics
    (Prometheus) and /openapi.json say the rest; docs/serve.md has examples. SIGTERM or Ctrl-C finishes what is held. A
    run that writes text is asked as OpenAI's models are.

    Examples:
      bloblora serve runs/desk
      bloblora serve runs/desk blue=runs/arc --port 8080 --api-key-file keys.txt
      curl localhost:8000/v1/predict --json '{"inputs": {"text": "where is my parcel"}}'

    Args:
        directories: folders of runs or hub:user/name, each alone or as NAME=FOLDER.
        settings: limits, and how the runs predict.
        host: address to listen on; 0.0.0.0 is every one of the machine's.
        port: to listen on; 0 lets the system choose.
        api_key_file: keys, one a line, of which a request must bring one as `Authorization: Bearer KEY`.
        allowed_hosts: names, separated by commas, that requests without a key may have in their Host header, apart from
            `host`, `localhost` and IP addresses; `*` is any.
        drain_seconds: after SIGTERM, how long /ready says 503 before new connections are refused.
        grace_seconds: after these, how long open requests may still take; a second SIGTERM or Ctrl-C ends at once.
        device: `cpu`, `cuda`, `cuda:N` or `mps`; default the GPU where there is one.
    """
    use_device(device)
    for name, seconds in (("drain_seconds", drain_seconds), ("grace_seconds", grace_seconds)):
        if not (math.isfinite(seconds) and seconds >= 0):
            raise RunError(f"{name} must be a finite number of at least 0, got {seconds}")
    keys = read_keys(api_key_file) if api_key_file else ()
    opened = open_hosted(directories, settings)
    taken = bind(host, port)
    hosted = load_hosted(opened, settings)
    for name, run in hosted.items():
        total = sum(parameter.numel() for parameter in run.run.model.parameters())
        print(f"{name}: {run.run.method.name}, {total:,} parameters, {run.shared_parameters:,} of them shared")
    hosts = [host, *(allowed_hosts.split(",") if allowed_hosts else ())]
    app = create_app(hosted, settings, keys, hosts)
    run_server(app, taken, drain_seconds, grace_seconds, lambda url: print(f"serving on {url}", flush=True))
