"""What an optimizer does to the vectors: pairs, and protected directions."""
