"""One adapted model: its state, and everything that adds, switches, merges, folds or removes adapters."""
