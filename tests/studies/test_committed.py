"""The project's own studies can be read, and every run in them has options that its method takes."""

from pathlib import Path

import pytest

from bloblora.studies import read_study

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_committed_study_is_whole(file, tmp_path):
    study = read_study(file)
    jobs = study.jobs(tmp_path)
    assert len(jobs) == len(study.seeds) * len(study.models) * len(study.datasets) * len(study.methods)
    assert len({job.name for job in jobs}) == len(jobs)
    assert f"bloblora compare {file.relative_to(STUDIES.parents[1])}" in file.read_text(encoding="utf-8")
