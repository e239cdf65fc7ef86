"""The command line `hra-fx`. Nothing else imports this package."""

import sys


def main() -> None:
    """Run the command line, and exit with its exit code."""
    try:
        from hra_fx.cli.app import run

        run()
    except KeyboardInterrupt:  # before a command runs; a running command reports what it has finished
        print("interrupted", file=sys.stderr)
        sys.exit(130)
