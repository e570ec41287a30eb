"""Offers the weights that this process holds to a trainer, which changes them in place.

``export(model)`` is for any PyTorch program; vLLM finds the plugin by itself (``vllm_plugin``). The words that
are exchanged over the socket are described in ``server``.
"""

from .errors import ExportError
from .export import Export, export
from .reading import TornModelError, reading

__all__ = ["Export", "ExportError", "TornModelError", "export", "reading"]
__version__ = "0.1.0"
