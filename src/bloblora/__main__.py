"""``python -m bloblora``."""

from .cli import main

main()
