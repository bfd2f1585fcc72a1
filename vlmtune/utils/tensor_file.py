"""Safetensors files, written tensor by tensor.

The library's own writer takes all tensors at once and writes from Rust, past every check of ours. The format is that of
https://github.com/huggingface/safetensors: eight bytes with the length of a JSON header, the header, the bytes.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vlmtune.utils.disk import Block, Written, write_file
from vlmtune.utils.errors import CheckpointError

_NAMES = {
    torch.float64: 'F64', torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16',
    torch.int64: 'I64', torch.int32: 'I32', torch.int16: 'I16', torch.int8: 'I8',
    torch.uint8: 'U8', torch.bool: 'BOOL', torch.float8_e4m3fn: 'F8_E4M3', torch.float8_e5m2: 'F8_E5M2',
}  # fmt: skip


class TensorLayout(NamedTuple):
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def layout_of(tensor: Tensor) -> TensorLayout:
    """The layout of a tensor that is at hand."""
    return TensorLayout(tensor.dtype, tuple(tensor.shape))


def check_tensors(found: Mapping[str, Sequence[int]], *, wanted: Mapping[str, TensorLayout]) -> None:
    """Tell whether a checkpoint holds exactly the weights that train, by their names and shapes.

    Args:
        found: the shapes of its tensors.
        wanted: the weights that train.

    Raises:
        CheckpointError: it does not.
    """
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        raise CheckpointError(
            f'the checkpoint does not fit the tuned parts: {len(missing)} tensors are missing '
            f'(first: {missing[:1]}), {len(extra)} are not trained here (first: {extra[:1]}); '
            'use the config that made it'
        )
    for name, layout in wanted.items():
        if (shape := tuple(found[name])) != layout.shape:
            raise CheckpointError(
                f'{name} is {shape} in the checkpoint, {layout.shape} here; use the config that made it'
            )


def write_tensors(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    layout: Mapping[str, TensorLayout],
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Write a safetensors file; only one tensor at a time has to be in memory.

    Args:
        path: of a new file.
        tensors: in the order of ``layout``, on any device.
        layout: of every tensor that will come.
        metadata: strings for the header.

    Raises:
        OSError: it could not be written.
        ValueError: the tensors are not those of the layout.
    """
    return write_file(path, _blocks(tensors, layout, dict(metadata or {})))


def _blocks(
    tensors: Iterable[tuple[str, Tensor]], layout: Mapping[str, TensorLayout], metadata: dict[str, str]
) -> Iterator[Block]:
    header: dict[str, object] = {'__metadata__': metadata} if metadata else {}
    end = 0
    for name, entry in layout.items():
        begin, end = end, end + entry.nbytes
        header[name] = dict(dtype=_NAMES[entry.dtype], shape=list(entry.shape), data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # so that the values are aligned
    yield len(text).to_bytes(8, 'little') + text
    expected = iter(layout.items())
    for name, tensor in tensors:
        if (name, layout_of(tensor)) != (want := next(expected, None)):
            raise ValueError(f'{name} {layout_of(tensor)} came where {want} was announced')
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        yield values.numpy().data
    if (left := next(expected, None)) is not None:
        raise ValueError(f'{left[0]} was announced and did not come')
