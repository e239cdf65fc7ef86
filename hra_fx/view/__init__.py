"""Pictures of adapted models."""

from hra_fx.view.picture import visualize

__all__ = ["visualize"]
