"""Tiny trained runs, and real servers on loopback."""

import shutil
import time
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread

import httpx
import pytest

from bloblora import runs
from bloblora.cli.calibrate import calibrate as calibrate_command
from bloblora.cli.text import GenerationOptions, correctness
from bloblora.data import ReadingOptions, support_desk
from bloblora.runs.decide import calibrate
from bloblora.runs.texts import WritingOptions
from bloblora.serving import Server, Settings, bind, create_app, load_hosted, open_hosted
from tests.conftest import OVER_A
from tests.generation.conftest import RECORDS
from tests.generation.conftest import trained as text_run
from tests.tiny_base import QUESTIONS, queries, write_jsonl

__all__ = ["text_run"]

SETTINGS = Settings(samples=3, batch_size=4, max_wait_ms=2.0, queue=64, max_inputs=32, max_tokens=128, max_samples=20)
TEXT_SETTINGS = replace(SETTINGS, new_tokens=16, max_new_tokens=60, max_tokens=200)
OPTIONS = {"steps": 2, "batch_size": 2, "r": 2, "learning_rate": 0.01}
LAX = {"risk": 0.9, "level": 0.5, "coverage": 0.6, "false_alarm": 0.3}


def trained(base, folder, *names):
    """Folders of runs by name: two on the same texts, ``three`` with one more label, and ``quiz`` on questions."""
    others = [*queries(), {"text": "do you sell pasta", "label": "other"}]
    data = {"desk": queries(), "lora": queries(), "three": others, "quiz": QUESTIONS}
    for name in names:
        method = {"method": "lora"} if name == "lora" else {"method": "blob", "std_learning_rate": 0.5, **OVER_A}
        file = str(write_jsonl(folder / f"{name}.jsonl", data[name]))
        runs.train(runs.RunConfig.of(data=file, output=str(folder / name), model=str(base), **OPTIONS, **method))
    return {name: str(folder / name) for name in names}


@pytest.fixture(scope="session")
def folders(base, tmp_path_factory):
    """All of them, and ``desk`` is calibrated."""
    folders = trained(base, tmp_path_factory.mktemp("serving"), "desk", "lora", "three", "quiz")
    held_out = [
        {"text": record["text"], "label": ("parcel", "refund")[i % 2]} for i, record in enumerate(support_desk("test"))
    ]
    calibrate(runs.open_run(folders["desk"]), held_out[:60], options=SETTINGS, **LAX)
    return folders


@pytest.fixture(scope="session")
def writer_folder(text_run, tmp_path_factory):
    """The run with a map to p_correct and promises, for the server's options; half of the references are others."""
    place = tmp_path_factory.mktemp("served")
    folder = shutil.copytree(text_run.config.output, place / "answers")
    options = GenerationOptions(samples=3, max_new_tokens=16)
    for number, record in enumerate(RECORDS):
        references = [
            {"prompt": record["prompt"], "response": text} for text in (record["response"], "iron") for _ in range(6)
        ]
        data = str(write_jsonl(place / f"{number}.jsonl", references))
        if number:
            writing, lax = WritingOptions(max_new_tokens=16), {"risk": 0.7, "confidence": 0.6, "coverage": 0.4}
            predicting = runs.PredictionOptions(samples=3)
            calibrate_command(predicting, ReadingOptions(), writing, str(folder), data, **lax)
        else:
            references = [*references, {"prompt": "Which sand?", "response": "no such thing"}]  # of another score
            data = str(write_jsonl(place / f"{number}.jsonl", references))
            correctness(str(folder), data, options, ReadingOptions(), maps=["platt"])
    return str(folder)


@pytest.fixture(scope="session")
def hosted(folders):
    return load_hosted(open_hosted([*folders.values()], SETTINGS), SETTINGS)


@contextmanager
def serving(hosted, settings=SETTINGS, keys=(), drain_seconds=0.0, allowed_hosts=(), grace_seconds=30.0):
    """A client of a server that runs in a thread; `client.server` is the server."""
    app = create_app(hosted, settings, keys, allowed_hosts)
    with bind("127.0.0.1", 0) as port:
        server = Server(app, drain_seconds, grace_seconds)
        thread = Thread(target=server.run, kwargs={"sockets": [port]})
        thread.start()
        url = "http://{}:{}".format(*port.getsockname())
        try:
            with httpx.Client(base_url=url, timeout=30, transport=httpx.HTTPTransport(retries=5)) as client:
                while not server.started:
                    assert thread.is_alive()
                    time.sleep(0.01)
                client.server = server
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def client(hosted):
    """Of a server of all runs, without keys."""
    with serving(hosted) as client:
        yield client
