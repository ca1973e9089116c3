"""The name that chapters knew `vector.inline` by."""

from book.support.vector import inline as compact

__all__ = ["compact"]
