"""A run's folder as one HTML page that needs nothing else: no network, no other file."""

from flashtrain.metrics.page.document import render

__all__ = ["render"]
