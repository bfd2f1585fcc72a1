"""What can be wrong with rows and images, found without model or tokenizer."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmtune.apps.data.data_problems import DataSetReport, Problem
from vlmtune.apps.data.image_checks import check_image
from vlmtune.data.boxes import pixel_boxes
from vlmtune.data.downloads import download
from vlmtune.data.images import Root
from vlmtune.data.parallel import default_workers, map_chunks
from vlmtune.data.sources import where
from vlmtune.structures import BoxPart, Conversation, ImageRef, ImageSize
from vlmtune.utils.errors import DataError, UserError
from vlmtune.utils.progress import Progress

_HASH_BYTES = 16


def check_files(
    rows: Sequence[Any],
    map_row: Callable[[Any], Conversation],
    *,
    image_folder: Root,
    decode: bool = False,
    workers: int | None = None,
) -> DataSetReport:
    """Check every row of a data set and every image it names.

    Args:
        rows: the data set; a row that cannot be read raises DataError when it is asked for.
        map_row: row -> Conversation.
        image_folder: root of the images.
        decode: decode every pixel; otherwise a header and the end of the file must do.
        workers: processes; None chooses.
    """
    report = DataSetReport(name=str(getattr(rows, 'name', 'rows')), rows=len(rows))
    checker = _Checker(rows, map_row, image_folder=image_folder, decode=decode)
    processes = default_workers(len(rows)) if workers is None else workers
    progress = Progress(f'{report.name}: rows checked', total=len(rows))
    hashed, hashes = [np.empty(0, np.int64)], [np.empty((0, 2), np.uint64)]
    for chunk in map_chunks(checker, len(rows), workers=processes):
        report.problems += chunk.problems
        report.images += chunk.images
        hashed.append(np.array(chunk.hashed, dtype=np.int64))
        hashes.append(np.frombuffer(chunk.hashes, dtype=np.uint64).reshape(-1, 2))
        progress.add(chunk.rows)
    report.problems += _duplicates(rows, np.concatenate(hashed), np.concatenate(hashes))
    return report


@dataclass(frozen=True)
class _Chunk:
    """What one range of rows gave."""

    rows: int
    images: int
    problems: list[Problem]
    hashed: list[int]  # the rows that could be read
    hashes: bytes  # 16 for each of those


class _Checker:
    """Checks ranges of rows; runs in worker processes."""

    def __init__(self, rows: Sequence[Any], map_row: Callable[[Any], Any], *, image_folder: Root, decode: bool) -> None:
        self.rows, self.map_row = rows, map_row
        self.image_folder, self.decode = image_folder, decode
        self._check_file = functools.lru_cache(maxsize=100_000)(self._check_image)  # rows share files

    def __call__(self, indices: range) -> _Chunk:
        problems: list[Problem] = []
        hashed: list[int] = []
        hashes: list[bytes] = []
        images = 0
        for index in indices:
            found, conversation = self._check_row(index)
            problems += [Problem(index, where(self.rows, index), kind, reason) for kind, reason in found]
            if conversation is not None:
                images += len(conversation.images)
                hashed.append(index)
                hashes.append(_hash(conversation))
        return _Chunk(len(indices), images, problems, hashed, b''.join(hashes))

    def _check_row(self, index: int) -> tuple[list[tuple[str, str]], Conversation | None]:
        """Kind and reason of everything that is wrong, and the conversation if there is one."""
        try:
            row = self.rows[index]
        except DataError as error:
            return [('unreadable_row', str(error))], None
        try:
            conversation = self.map_row(row)
            _check_conversation(conversation)
        except DataError as error:
            return [(error.kind, str(error))], None
        except UserError:
            raise  # a setting of the function is wrong, for all rows
        except Exception as error:  # a function of the user's own may fail in any way, and the other rows wait
            return [('failed_function', f'{type(error).__name__}: {error}')], None
        return [(error.kind, str(error)) for error in self._check_images(conversation)], conversation

    def _check_images(self, conversation: Conversation) -> list[DataError]:
        checked = [
            self._check_image(image) if image.path is None else self._check_file(image) for image in conversation.images
        ]
        if errors := [result for result in checked if isinstance(result, DataError)]:
            return errors
        try:
            pixel_boxes(conversation, image_sizes=[size for size in checked if isinstance(size, ImageSize)])
        except DataError as error:
            return [error]
        return []

    def _check_image(self, image: ImageRef) -> ImageSize | DataError:
        try:
            if image.path is not None:
                download(image.path, self.image_folder)
            return check_image(image, root=self.image_folder, decode=self.decode)
        except DataError as error:
            return DataError(str(error), kind=error.kind)  # without the traceback, which would keep the pixels


def _check_conversation(conversation: Any) -> None:
    """What a map function of the user's own may have left undone.

    Raises:
        DataError: no Conversation, an empty answer, or images that are not shown one by one in their order.
    """
    if not isinstance(conversation, Conversation):
        raise DataError(f'dataset_map_fn returned a {type(conversation).__name__}; expected a Conversation')
    for i, message in enumerate(conversation.messages):
        written = message.text.strip() or any(isinstance(part, BoxPart) for part in message.parts)
        if message.role == 'assistant' and not written:
            raise DataError(f'message {i} (assistant) is empty; expected text', kind='empty_answer')
    shown = list(conversation.shown_images())
    if shown != list(range(len(conversation.images))):
        raise DataError(
            f'shows the images {shown} but has {len(conversation.images)}; expected each once, in order',
            kind='mark_mismatch',
        )


def _hash(conversation: Conversation) -> bytes:
    """16 bytes, equal for equal messages about equal images (the same path, or the same bytes)."""
    digest = hashlib.blake2b(repr(conversation.messages).encode(errors='surrogatepass'), digest_size=_HASH_BYTES)
    for image in conversation.images:
        digest.update(image.data if image.data is not None else f'\0{image.path}'.encode(errors='surrogatepass'))
    return digest.digest()


def _duplicates(rows: Sequence[Any], indices: np.ndarray, hashes: np.ndarray) -> list[Problem]:
    """One problem for every row whose hash an earlier row has.

    Args:
        rows: the data set.
        indices: int64[R], the rows that could be read.
        hashes: uint64[R, 2].
    """
    _, first, group = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    original = first[group.reshape(-1)]
    again = np.flatnonzero(original != np.arange(len(indices)))
    pairs = zip(indices[again].tolist(), indices[original[again]].tolist(), strict=True)
    return [
        Problem(index, where(rows, index), 'duplicate', f'is the same as {where(rows, earlier)}')
        for index, earlier in pairs
    ]
