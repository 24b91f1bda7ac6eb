"""The fast version of the load with texts: that it runs, and goes on where it was stopped."""

import json
import sys

import pytest
import serving_text

from tests.generation.conftest import trained

__all__ = ["trained"]


def test_it_runs_and_repeats_nothing(trained, tmp_path, monkeypatch):
    folder = str(trained.config.output)
    few = ["--samples", "2", "--tokens", "3", "--rounds", "2", "--clients", "1", "2", "--seconds", "0.5"]
    monkeypatch.setattr(sys, "argv", ["serving_text.py", folder, folder, *few, "--results", str(tmp_path)])
    (tmp_path / "results.json").write_text(json.dumps({"load": {"N = 2, 1 clients": {"answers a second": 7.0}}}))
    serving_text.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["load"].pop("N = 2, 1 clients") == {"answers a second": 7.0}
    ways = ("plain LoRA", "N = 2", "N = 2, average")
    assert results["load"].keys() == {f"{way}, {n} clients" for way in ways for n in (1, 2)} - {"N = 2, 1 clients"}
    assert all(one["seconds of one"] > 0 and one["answers a second"] < 1e4 for one in results["load"].values())
    first = results["first token"]
    assert first["plain LoRA"]["over the plain LoRA's"]["median"] == pytest.approx(1)
    assert 0 < first["N = 2"]["seconds"]["median"] < 60
    assert "N = 2, 2 clients" in (tmp_path / "README.md").read_text()
