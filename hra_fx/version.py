"""The version of the package; pyproject.toml and the command line read it from here."""

VERSION = "0.5.0"
