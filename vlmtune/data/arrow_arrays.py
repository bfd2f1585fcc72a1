"""Arrow arrays out of numpy arrays and back, without a copy on the way back.

pyarrow's own ``pa.array`` and ``to_numpy`` import pandas, wherever it is installed: half a second and 40 MB, in every
process.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def number_array(values: np.ndarray) -> pa.Array:
    """Numbers of the type they have."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def text_array(values: Sequence[str]) -> pa.Array:
    """Texts."""
    encoded = [value.encode('utf-8', 'replace') for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), len(values), [None, pa.py_buffer(ends), pa.py_buffer(b''.join(encoded))])


def list_array(lengths: Sequence[int], values: pa.Array) -> pa.Array:
    """Lists of these lengths, one after the other in ``values``."""
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    return pa.Array.from_buffers(pa.list_(values.type), len(lengths), [None, pa.py_buffer(ends)], children=[values])


def number_lists(arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> pa.Array:
    """One list of numbers for every array."""
    values = np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype, casting='same_kind')
    return list_array([len(array) for array in arrays], number_array(values))


def numbers_of(array: pa.Array) -> np.ndarray:
    """The numbers, read-only, where Arrow has them."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    buffer = array.buffers()[1]
    if buffer is None or not len(array):
        return np.empty(0, dtype)
    return np.frombuffer(buffer, dtype, count=len(array), offset=array.offset * dtype.itemsize)


def list_of(array: pa.Array, index: int) -> np.ndarray:
    """One list of numbers."""
    start, end = numbers_of(array.offsets)[index : index + 2]
    return numbers_of(array.values)[start:end]
