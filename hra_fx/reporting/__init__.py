"""What the adapters of a model did: the report, its formats and its plots. Import from the modules below."""
