"""The one way in which checkpoints of other programs, which are pickles, are read. Nothing that they hold is run.

Three lines of defence: the pickle is looked through first (``pickle_scan``), ``torch.load(weights_only=True)`` reads
it, and every class of another program that old checkpoints mention stands for nothing: mmengine's message history,
numpy's scalars, DeepSpeed's loss scaler and so on are read as objects without content or methods.
"""

import io
import mmap
import os
import struct
import tarfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.utils.errors import CheckpointError, first_line
from vlmtune.utils.pickle_scan import Readable, Rules, Storage, scan_pickle

MAX_PICKLE_BYTES = 256 * 2**20
"""Of what is not tensors. A checkpoint of 100,000 tensors has 20 MB of it."""
_DEEPEST = 64
_ZIP = b'PK\x03\x04'
_BROKEN = (
    RuntimeError, UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
    OverflowError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


class _Nothing:
    """What stands for an object of a class that is not wanted. It keeps nothing that it is given."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> '_Nothing':
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


def _new_dict(*_: Any) -> dict[Any, Any]:
    return {}


_STUBBED = (
    'mmengine.logging.history_buffer.HistoryBuffer',
    'builtins.getattr',  # HistoryBuffer's own methods are written as getattr(HistoryBuffer, 'mean')
    *(f'numpy.{core}.multiarray.{name}' for core in ('core', '_core') for name in ('_reconstruct', 'scalar')),
    'numpy.ndarray',
    'numpy.dtype',
    'mmengine.config.config.ConfigDict',
    'argparse.Namespace',
    'pathlib.PosixPath',
    'deepspeed.runtime.fp16.loss_scaler.LossScaler',
    'deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler',
    'deepspeed.runtime.zero.config.ZeroStageEnum',
    'deepspeed.utils.tensor_fragment.fragment_address',
)
_STANDINS: list[Any] = [
    *((_Nothing, name) for name in _STUBBED),
    (_new_dict, 'collections.defaultdict'),
]
_DTYPES = ('float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'int16', 'int8', 'uint8', 'bool')
_ITEM_BYTES = {
    **dict.fromkeys(('torch.DoubleStorage', 'torch.LongStorage', 'torch.ComplexFloatStorage'), 8),
    **dict.fromkeys(('torch.FloatStorage', 'torch.IntStorage'), 4),
    **dict.fromkeys(('torch.HalfStorage', 'torch.BFloat16Storage', 'torch.ShortStorage'), 2),
    **dict.fromkeys(('torch.CharStorage', 'torch.ByteStorage', 'torch.BoolStorage'), 1),
    'torch.storage.UntypedStorage': 1,
}
_RULES = Rules(
    callable=frozenset((
        *_STUBBED, 'collections.OrderedDict', 'collections.defaultdict', 'builtins.set', 'builtins.complex',
        'torch.Size', 'torch.device', 'torch.serialization._get_layout', 'torch._utils._rebuild_tensor',
        'torch._utils._rebuild_tensor_v2', 'torch._utils._rebuild_tensor_v3', 'torch._utils._rebuild_parameter',
        'torch._utils._rebuild_parameter_with_state',
    )),
    buildable=frozenset((*_STUBBED, 'collections.OrderedDict')),
    other=frozenset((
        '_codecs.encode', 'builtins.dict', 'builtins.list', 'builtins.int', 'builtins.float',
        *(f'torch.{name}' for name in _DTYPES), *_ITEM_BYTES,
    )),
)  # fmt: skip
_STANDINS += [(_Nothing, f'builtins.{name}') for name in ('dict', 'list', 'int', 'float')]  # of defaultdict


def check_legacy(path: Path) -> None:
    """Look through a file of torch.save without reading its tensors.

    Raises:
        CheckpointError: see ``load_legacy``.
    """
    with _reading(path):
        if tarfile.is_tarfile(path):
            raise CheckpointError('an archive of a torch older than 0.2; save it again with a newer one')
        _check_storages(_scan_zip(path) if zipfile.is_zipfile(path) else _scan_raw(path), path.stat().st_size)


def load_legacy(path: Path) -> Any:
    """What a file of torch.save holds: dicts, lists, tuples, numbers, texts and tensors on the CPU.

    Files of mmengine, XTuner and DeepSpeed are read, of any age but tar archives. The tensors of newer ones stay in the
    file until they are used. Objects of other classes become None.

    Raises:
        CheckpointError: it names a class or function that has no place in a checkpoint, claims more memory than it has
            bytes, is broken, or is not of torch.save.
    """
    check_legacy(path)
    with _reading(path), torch.serialization.safe_globals(_STANDINS):
        loaded = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
        return _plain(loaded, seen={}, depth=0)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong inside is told with the file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f'{path} is not read: {error}; expected tensors as torch.save writes them') from error
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {error.strerror or error}') from error
    except _BROKEN as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f'{path} is broken or was not written by torch.save ({first_line(error)})')


def _scan_zip(path: Path) -> list[Storage]:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise CheckpointError('an archive with compressed or overlapping files')
        if len(set(names)) != len(names):
            raise CheckpointError('an archive with two files of one name')
        pickles = [entry for entry in entries if entry.filename.endswith('/data.pkl')]
        if len(pickles) != 1 or any(name.endswith('/constants.pkl') for name in names):
            raise CheckpointError('a program (TorchScript) or an archive of something else')
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(f'an archive with a pickle of {pickles[0].file_size:,} bytes')
        return _scan(io.BytesIO(archive.read(pickles[0])))[1]


def _scan_raw(path: Path) -> list[Storage]:
    """A file of a torch older than 1.6: five pickles, then the values."""
    if path.stat().st_size == 0:
        raise CheckpointError('it is empty')
    with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        if stream[: len(_ZIP)] == _ZIP:  # the list of what is in an archive stands at its end
            raise CheckpointError('it is cut short: it begins as torch.save writes it, and its end is missing')
        magic, _ = _scan(stream)
        if magic != torch.serialization.MAGIC_NUMBER:
            raise CheckpointError('a pickle of something else')
        _scan(stream), _scan(stream)  # version and byte order
        storages = _scan(stream)[1]
        _scan(stream)
    return storages


def _scan(stream: Readable) -> tuple[Any, list[Storage]]:
    return scan_pickle(stream, rules=_RULES)


def _check_storages(storages: list[Storage], file_bytes: int) -> None:
    for storage in storages:
        if storage.kind not in _ITEM_BYTES:
            raise CheckpointError(f'a storage of {storage.kind}')
        if storage.values * _ITEM_BYTES[storage.kind] > file_bytes:
            raise CheckpointError(f'a tensor of {storage.values:,} values in a file of {file_bytes:,} bytes')


def _plain(value: Any, *, seen: dict[int, Any], depth: int) -> Any:
    """Plain copies of the containers; one that is there twice is copied once, so that nothing grows."""
    if depth > _DEEPEST:
        raise CheckpointError(f'values nested deeper than {_DEEPEST}')
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Tensor):
        return _checked(value)
    if type(value) in (dict, OrderedDict, Counter):
        copy: dict[Any, Any] = {}
        seen[id(value)] = copy
        copy.update((key, _plain(item, seen=seen, depth=depth + 1)) for key, item in value.items())
        return copy
    if type(value) in (list, set):
        items: list[Any] = []
        seen[id(value)] = items
        items.extend(_plain(item, seen=seen, depth=depth + 1) for item in value)
        return items
    if type(value) in (tuple, torch.Size):
        made = tuple(_plain(item, seen=seen, depth=depth + 1) for item in value)
        seen[id(value)] = made
        return made
    return value if type(value) in (int, float, bool, str, bytes, complex, torch.dtype, torch.device) else None


def _checked(tensor: Tensor) -> Tensor:
    tensor = tensor.detach() if type(tensor) is nn.Parameter else tensor
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type != 'cpu':
        raise CheckpointError(f'a tensor of an unusual kind ({type(tensor).__name__}, {tensor.layout})')
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f'a tensor of {tensor.numel():,} values over a storage of fewer')
    return tensor


# ---- where weights are in what was loaded

_DEEPSPEED_WEIGHTS = 'mp_rank_00_model_states.pt'


def find_legacy_file(path: Path) -> Path | None:
    """The file that holds the weights: the path itself, or the one inside a directory that DeepSpeed wrote.

    Raises:
        CheckpointError: the directory holds pieces of weights (ZeRO-3).
    """
    if path.is_file():
        return path
    folders = [path]
    if (latest := path / 'latest').is_file():
        tag = latest.read_bytes()[:200].decode('utf-8', 'replace').strip()
        folders.append(path / os.path.basename(tag))
    for folder in folders:
        if (folder / _DEEPSPEED_WEIGHTS).is_file():
            return folder / _DEEPSPEED_WEIGHTS
        if any(folder.glob('zero_pp_rank_*_model_states.pt')):
            raise CheckpointError(
                f'{folder} holds every weight in pieces (DeepSpeed ZeRO-3); join them by zero_to_fp32 of DeepSpeed or '
                'pth_to_hf of XTuner, and load what that writes'
            )
    return None


def legacy_weights(path: Path) -> dict[str, Tensor]:
    """The weights by name of a file of mmengine (``state_dict``), DeepSpeed (``module``), or of tensors alone.

    Raises:
        CheckpointError: it cannot be read, see ``load_legacy``, or holds no weights.
    """
    content = load_legacy(path)
    for key in ('state_dict', 'module'):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    weights = content if isinstance(content, Mapping) else {}
    found = {name: value for name, value in weights.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not found:
        raise CheckpointError(f'{path} holds no weights; expected tensors by name, or under "state_dict" or "module"')
    return found
