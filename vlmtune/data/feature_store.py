"""What a frozen vision encoder says about each image, in a file that is memory-mapped.

A store is a folder of three files. ``features.bin`` holds the numbers, one image after the other, in the dtype in which
the encoder computed them. ``index.npy`` is uint64[M, 3], sorted: digest of an image's name, its first row, its rows.
``info.json`` holds the shape of a row and what was wrong with images that could not be decoded.

Letters: M images, R rows (one per image, or one per tile of an image), N features of a row, D their size.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmtune.data.images import Root, resolve_image_path
from vlmtune.structures import ImageRef
from vlmtune.utils.errors import DataError

_INFO, _INDEX, _FEATURES = 'info.json', 'index.npy', 'features.bin'


class Entry(NamedTuple):
    """The features of one image: its name, features [R, N, D], and why it could not be decoded, if so."""

    name: str
    features: Tensor
    broken: str | None = None


def image_name(ref: ImageRef, *, root: Root) -> str:
    """What an image is called in a store: its file, links resolved, or the sha256 of its bytes."""
    return str(resolve_image_path(ref, root)) if ref.data is None else hashlib.sha256(ref.data).hexdigest()


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode('utf-8', 'surrogateescape')).digest()[:8], 'big')


def write_features(folder: Path, entries: Iterable[Entry]) -> None:
    """Write a store beside ``folder`` and move it there when it is complete.

    Raises:
        DataError: there are no images, or two names have one digest.
        OSError: it could not be written.
    """
    staging = folder.with_name(f'{folder.name}.{os.getpid()}.partial')
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        index, info, broken, row = [], {}, {}, 0
        with (staging / _FEATURES).open('wb') as file:
            for name, features, reason in entries:
                info = dict(shape=list(features.shape[1:]), dtype=str(features.dtype).removeprefix('torch.'))
                file.write(features.contiguous().view(torch.uint8).numpy().data)
                index.append((_digest(name), row, len(features)))
                row += len(features)
                if reason is not None:
                    broken[str(index[-1][0])] = reason
        if not index:
            raise DataError('there are no images to encode; remove vision_cache')
        table = np.array(sorted(index), dtype=np.uint64)
        if (table[1:, 0] == table[:-1, 0]).any():
            raise DataError('two images have one digest; rename a file')
        np.save(staging / _INDEX, table)
        (staging / _INFO).write_text(json.dumps({**info, 'rows': row, 'broken': broken}), 'utf-8')
        os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class FeatureStore:
    """Reads the features of images.

    Args:
        folder: written by ``write_features``.
        root: the image folder of the data set that asks.
    """

    def __init__(self, folder: Path, *, root: Root) -> None:
        self.folder, self.root = folder, root
        info = json.loads((folder / _INFO).read_text('utf-8'))
        self.shape, self.dtype = tuple(info['shape']), getattr(torch, info['dtype'])
        self.rows, self.broken = info['rows'], {int(digest): reason for digest, reason in info['broken'].items()}

    @staticmethod
    def is_complete(folder: Path) -> bool:
        """Whether all is there and the file of features has the size that its description says."""
        if not all((folder / name).is_file() for name in (_INFO, _INDEX, _FEATURES)):
            return False
        info = json.loads((folder / _INFO).read_text('utf-8'))
        size = info['rows'] * int(np.prod(info['shape'])) * getattr(torch, info['dtype']).itemsize
        return (folder / _FEATURES).stat().st_size == size

    @cached_property
    def _index(self) -> np.ndarray:
        return np.load(self.folder / _INDEX, mmap_mode='r')

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.memmap(self.folder / _FEATURES, mode='r', dtype=np.uint8).reshape(self.rows, -1)

    def __getstate__(self) -> dict:  # workers map the files themselves
        return {name: value for name, value in self.__dict__.items() if name not in ('_index', '_bytes')}

    def read(self, refs: Sequence[ImageRef]) -> tuple[Tensor, str | None]:
        """Features [R, N, D] of all images in order, and what is wrong with the first broken one of them.

        Raises:
            DataError: an image that is not in the store.
        """
        found, broken = [], None
        for ref in refs:
            digest = _digest(image_name(ref, root=self.root))
            at = int(np.searchsorted(self._index[:, 0], np.uint64(digest)))
            if at == len(self._index) or int(self._index[at, 0]) != digest:
                raise DataError(f'image {ref} is not in the vision cache {self.folder}; remove that folder')
            start, rows = self._index[at, 1:].tolist()
            found.append(self._bytes[start : start + rows])
            broken = broken or self.broken.get(digest)
        joined = torch.from_numpy(np.concatenate(found))
        return joined.view(self.dtype).view(-1, *self.shape), broken
