"""`python -m heronry`."""

from .cli.app import main

main()
