"""Tiny random models, their tokenizers and processors, and tiny data sets. Imported by tests and benchmarks only."""

import vlmtune.utils.lean_imports  # noqa: F401  # before anything that imports transformers
from vlmtune.testing.broken_data import BrokenData, write_broken_data
from vlmtune.testing.tiny_data import TinyData, write_tiny_data
from vlmtune.testing.tiny_models import list_tiny_models, list_tiny_originals, write_tiny_model

__all__ = [
    'BrokenData',
    'TinyData',
    'list_tiny_models',
    'list_tiny_originals',
    'write_broken_data',
    'write_tiny_data',
    'write_tiny_model',
]
