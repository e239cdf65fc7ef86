"""Public entry points: `transform`, `fold`, `graphs`, `load_adapter`, and PEFT's names and methods."""
