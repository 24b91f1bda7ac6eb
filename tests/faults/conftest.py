"""The runs and the commands of `tests.cli`."""

from tests.cli.conftest import call, choice_run, files, run  # noqa: F401
