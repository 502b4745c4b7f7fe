"""The command `heronry`, also as `python -m heronry`."""

import sys


def main() -> None:
    """Run the command line, or say in one line how to install what it needs."""
    try:
        from .cli.app import main as run_command_line
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print("heronry: the command line needs typer: pip install 'heronry[cli]'", file=sys.stderr)
        sys.exit(2)
    run_command_line()


if __name__ == "__main__":
    main()
