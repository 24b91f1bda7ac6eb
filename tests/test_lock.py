"""The lock file against the versions that people are told to install."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)(.*)$", re.MULTILINE)


def versions(file):
    found = {}
    for name, version, _ in PINNED.findall((ROOT / file).read_text()):
        found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), set()).add(version)
    return found


def test_it_has_the_constraints_versions():
    locked, constraints = versions("requirements.lock"), versions("constraints.txt")
    both = constraints.keys() & locked.keys()
    assert {name: locked[name] for name in both} == {name: constraints[name] for name in both}
    assert {"transformers", "peft", "pytest", "fastapi"} <= both
    assert "torch" not in locked  # each machine needs a build of its own


def test_each_version_has_a_hash():
    for file in ("requirements.lock", "tests/methods/laplace-torch.lock"):
        text = (ROOT / file).read_text()
        entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]
        assert len(entries) > 5
        assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
