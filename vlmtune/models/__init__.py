"""What is trained: a transformers model, its tunable parts, and the loss."""

import vlmtune.utils.lean_imports  # noqa: F401  # before anything that imports transformers
from vlmtune.models.loading import load_model
from vlmtune.models.quantization import QUANTIZATIONS
from vlmtune.models.supervised_finetune import SupervisedFinetune

__all__ = ['QUANTIZATIONS', 'SupervisedFinetune', 'load_model']
