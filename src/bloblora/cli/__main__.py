"""``python -m bloblora.cli``."""

from . import main

main()
