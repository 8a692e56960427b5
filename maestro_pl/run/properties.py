"""Properties of modules whose errors are their own."""

from __future__ import annotations

from typing import Any


class PlainProperties:
    """Put in front of ``nn.Module``: a property that raises an ``AttributeError`` says so itself.

    ``nn.Module`` would report the property as an attribute that does not exist.
    """

    def __getattr__(self, name: str) -> Any:
        """Called after the property has failed: fail again, with the error itself."""
        found = getattr(type(self), name, None)
        if isinstance(found, property) and found.fget is not None:
            return found.fget(self)
        inherited: Any = super()
        return inherited.__getattr__(name)
