"""Reports on the adapters of a model, and their formats. Import from the modules below."""
