"""Looking at answers: generation in batches, metrics."""

from vlmtune.evaluation.generation import generate, stop_tokens
from vlmtune.evaluation.metrics import exact_match

__all__ = ['exact_match', 'generate', 'stop_tokens']
