"""An export's folder: whole or not there, and described."""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

from bloblora import runs
from bloblora.cli import main
from bloblora.export import export, read_manifest
from bloblora.export.export import _vllm_command
from bloblora.runs import RunError
from tests.tiny_base import write_signed

PROGRAM = "import sys; from bloblora.export import export; export(*sys.argv[1:3], num_samples=2000)"


def test_the_manifest_describes_the_files(run_of, tmp_path):
    written = export(run_of("blob"), tmp_path / "out", num_samples=2, seed=3)
    manifest = read_manifest(tmp_path / "out", check_files="*")
    assert manifest == written
    assert (manifest.method, manifest.num_samples, manifest.seed) == ("blob", 2, 3)
    assert (manifest.mean, manifest.draws) == ("mean", ["draw_00", "draw_01"])
    assert manifest.adapter_sha256 == runs.open_run(run_of("blob")).adapter_sha256
    assert manifest.task == runs.open_run(run_of("blob")).task.to_dict()
    found = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {str(path.relative_to(tmp_path / "out")) for path in found} == {*manifest.files, "manifest.json"}
    for name, expected in manifest.files.items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == expected


@pytest.mark.parametrize(("method", "format"), [("blob", "lora"), ("full", "merged"), ("swag", "merged")])
def test_others_can_read_a_run_and_an_export(method, format, run_of, tmp_path):
    """safetensors writes files of mode 0600; all must have the one that the umask gives."""
    export(run_of(method), tmp_path / "out", format, num_samples=1)
    own = (tmp_path / "out" / "manifest.json").stat().st_mode
    assert own & 0o004
    for folder in (run_of(method), tmp_path / "out"):
        assert [str(f) for f in folder.rglob("*") if f.is_file() and f.stat().st_mode != own] == []


def test_a_damaged_export_is_named(run_of, tmp_path):
    folder = tmp_path / "out"
    export(run_of("blob"), folder, num_samples=1)
    file = folder / "draw_00" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match=r"draw_00/adapter_model.safetensors: missing, or its SHA-256 isn't"):
        read_manifest(folder, check_files="*")
    content = json.loads((folder / "manifest.json").read_text())
    for change, message in (
        ({"format_version": 2}, "format_version is 2; this bloblora reads 1"),
        ({"draws": None}, "field 'draws' must be .*, got None"),
        ({"task": {"name": "riddle"}}, "not what `bloblora export` writes: task: 'riddle'"),
    ):
        write_signed(folder / "manifest.json", content | change)
        with pytest.raises(RunError, match=message):
            read_manifest(folder)
    with pytest.raises(RunError, match=r"manifest.json: not readable as JSON"):
        read_manifest(tmp_path)


def test_exports_of_one_seed_are_equal(run_of, tmp_path):
    first, again, other = (export(run_of("blob"), tmp_path / str(i), num_samples=2, seed=i // 2) for i in range(3))
    assert first.files == again.files
    assert first.files["draw_00/adapter_model.safetensors"] != other.files["draw_00/adapter_model.safetensors"]


def test_a_draw_does_not_depend_on_how_many_follow(run_of, tmp_path):
    few, many = (export(run_of("blob"), tmp_path / str(n), num_samples=n) for n in (1, 3))
    assert few.files.items() <= many.files.items()


def test_nothing_is_left_of_a_failure(run_of, tied_base, tmp_path):
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(RunError, match="blocked: is a file or a folder that isn't empty; choose another output"):
        export(run_of("blob"), tmp_path / "blocked")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(RunError, match="full: is a file or a folder that isn't empty; choose another output"):
        export(run_of("blob"), tmp_path / "full")
    with pytest.raises(RunError, match=r"llama.cpp takes no LoRA of this layer"):
        export(run_of("lora", target_modules=["lm_head"], model=str(tied_base)), tmp_path / "out", "gguf")
    assert {file.name for file in tmp_path.iterdir()} == {"blocked", "full"}


def test_a_kill_leaves_no_folder_and_the_next_export_succeeds(run_of, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-c", PROGRAM, str(run_of("blob")), str(output)]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        while not (tmp_path / ".out.partial" / "draw_00").is_dir():
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    output.mkdir()  # an empty folder is free
    export(run_of("blob"), output, num_samples=1)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_command(run_of, tmp_path, capsys):
    command = ["export", str(run_of("blob")), "--output", str(tmp_path / "my out")]
    main([*command, "--samples", "2", "--seed", "4"])
    said = capsys.readouterr().out
    assert f"vllm: cd '{tmp_path / 'my out'}' && vllm serve " in said
    assert "mean, draw_00, draw_01" in said
    assert read_manifest(tmp_path / "my out").seed == 4
    with pytest.raises(SystemExit):
        main(command)
    assert "choose another output" in capsys.readouterr().err
    assert shlex.split(_vllm_command("my models/base", ["mean"], 8))[2:4] == ["my models/base", "--enable-lora"]
