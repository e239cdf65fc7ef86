"""The command line `hra-fx`. The library does not import this package."""


def main() -> None:
    """Run the command line, and exit with its exit code."""
    from hra_fx.cli.app import run

    run()
