"""The command line `hra-fx`: what a shell asks of adapters and checkpoints. Nothing else imports it."""

from hra_fx.cli.app import app as app, main as main
