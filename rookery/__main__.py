"""`python -m rookery`."""

from .cli import main

main()
