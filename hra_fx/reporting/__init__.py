"""Reports on the adapters of a model, their formats and plots. Import from the modules below."""
