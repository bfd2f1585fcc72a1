"""Reads trained weights from ``model.safetensors``, whole or by stretches of the flattened tensor."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmtune.utils.errors import CheckpointError
from vlmtune.utils.tensor_file import TensorLayout, check_tensors


class TrainableFile(ExitStack):
    """The trained weights in a file, which is open until this is left; nothing is read before it is asked for.

    Args:
        path: of a safetensors file.
        layout: the weights that train in this run, by name.

    Raises:
        CheckpointError: it is no safetensors file, or its names or shapes are not exactly those that train.
    """

    def __init__(self, path: Path, *, layout: Mapping[str, TensorLayout]) -> None:
        super().__init__()
        try:
            self._file = self.enter_context(safe_open(path, framework='pt'))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f'{path} cannot be read as a safetensors file ({error})') from error
        names = self._file.keys()
        check_tensors({name: self._file.get_slice(name).get_shape() for name in names}, wanted=layout)

    def whole(self, name: str) -> Tensor:
        """A weight in its shape, in the dtype of the file."""
        return self._file.get_tensor(name)

    def stretch(self, name: str, *, start: int, numel: int) -> Tensor:
        """A part of a flattened weight, [numel], in the dtype of the file; no more rows are read than it touches."""
        piece = self._file.get_slice(name)
        shape = piece.get_shape()
        if not shape or numel == 0:
            return self.whole(name).flatten()[start : start + numel]
        per_row = max(math.prod(shape[1:]), 1)
        first, last = start // per_row, -(-(start + numel) // per_row)
        return piece[first:last].flatten()[start - first * per_row :][:numel]
