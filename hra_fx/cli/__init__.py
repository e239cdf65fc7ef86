"""The command line `hra-fx`: what a shell asks of adapters and checkpoints. Nothing else imports it."""

import sys


def main() -> None:
    """Run what the shell asks for, and leave with its exit code."""
    try:
        from hra_fx.cli.app import run

        run()
    except KeyboardInterrupt:  # before a command runs, which tells of it with what it has finished
        print("stopped: nothing was finished", file=sys.stderr)
        sys.exit(130)
