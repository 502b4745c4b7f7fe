"""The command `heronry`, also as `python -m heronry`."""

import signal
import sys


def main() -> None:
    """Run the command line, or say in one line how to install what it needs."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of imports, or of what Python does at the exit
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
