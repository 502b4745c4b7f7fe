"""`python -m heronry`."""

from .cli import main

main()
