"""Pictures of graphs, before and after: as text, for pages, and for other programs."""

from fxcompress.picture.data import graph_data
from fxcompress.picture.picture import Picture

__all__ = ["Picture", "graph_data"]
