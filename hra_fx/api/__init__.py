"""Public entry points that accept an eager model, a `GraphModule` or an exported program."""
