"""Capture: from a module's Python forward to graphs that are only used where they are known to say the same."""
