"""The home of `HRATrainer` and two callbacks in 0.4. Their errors say what to use instead."""

from hra_fx.integrations import __getattr__ as __getattr__
