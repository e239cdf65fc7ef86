"""Training: pairs, protected directions, the distance to the base, and a model's own texts."""
