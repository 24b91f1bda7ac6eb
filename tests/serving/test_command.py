"""The command in a process of its own, from its start to SIGTERM; and what it refuses before it loads a model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from bloblora.cli import main
from bloblora.serving import bind


def test_sigterm_finishes_what_is_held(folders, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("the-key\n")
    names = [folders["desk"], f"second={folders['lora']}"]
    options = [
        "--port",
        "0",
        "--samples",
        "3",
        "--batch-size",
        "1",
        "--api-key-file",
        str(keys),
        "--drain-seconds",
        "2",
    ]
    command = [sys.executable, "-m", "bloblora", "serve", *names, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, env=environment) as process:
        said = [process.stdout.readline() for _ in range(3)]
        assert said[0].startswith("desk: blob, ")
        assert said[1].startswith("second: lora, ")
        assert not said[1].endswith(" 0 of them shared\n")
        url = said[2].removeprefix("serving on ").strip()
        with httpx.Client(base_url=url, headers={"Authorization": "Bearer the-key"}, timeout=60) as client:
            body = {"model": "desk", "samples": 20, "inputs": [{"text": "where is my parcel"}] * 60}
            with ThreadPoolExecutor(1) as pool:
                held = pool.submit(client.post, "/v1/predict", json=body)
                while "bloblora_queue_length 0.0" in client.get("/metrics").text:
                    time.sleep(0.005)
                process.send_signal(signal.SIGTERM)
                while client.get("/ready").status_code != 503:
                    time.sleep(0.005)
                assert len(held.result().json()["answers"]) == 60
        assert process.wait(30) == 0


def test_refused_before_a_model_is_loaded(folders, tmp_path, capsys):
    folder = Path(shutil.copytree(folders["lora"], tmp_path / "run"))
    description = json.loads((folder / "run.json").read_text())
    description["config"]["model"] = "./no-such-model"
    (folder / "run.json").write_text(json.dumps(description))
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        for options, message in (
            ({"port": port}, f"host '127.0.0.1', port {port}: can't listen there: .*in use"),
            ({"port": 70_000}, "port 70000: can't listen there"),
            ({"host": "nowhere.invalid"}, "host 'nowhere.invalid', port 8000: can't listen there"),
            ({"drain_seconds": -1.0}, "drain_seconds must be a finite number of at least 0, got -1.0"),
            ({"grace_seconds": -1.0}, "grace_seconds must be a finite number of at least 0, got -1.0"),
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"api_key_file": "nowhere"}, "api_key_file 'nowhere': can't be read"),
            ({"directories": [str(tmp_path)]}, "no run.json in it"),
            ({"port": 0}, "model './no-such-model': no such folder"),
        ):
            directories = options.pop("directories", [str(folder)])
            given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
            with pytest.raises(SystemExit):
                main(["serve", *directories, *given])
            assert re.search(message, capsys.readouterr().err)


def test_without_its_libraries(folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bloblora.serving", None)
    monkeypatch.delitem(sys.modules, "bloblora.cli.serve", raising=False)
    with pytest.raises(SystemExit):
        main(["serve", folders["lora"]])
    assert "pip install 'bloblora[serve]'" in capsys.readouterr().err
