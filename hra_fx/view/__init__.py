"""Pictures of adapted models."""
