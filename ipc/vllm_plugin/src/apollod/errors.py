"""The one error of this package."""


class ExportError(RuntimeError):
    """The weights cannot be offered. The message says which tensor or setting is why, and what to do."""
