"""Predictions on disk: a line per answer as it comes, so that a run that was killed goes on where it stopped.

While a run is on, each rank adds to a part beside the file, whose first line says what was asked of which model. Once
all is answered, the rows stand in the file itself, in the order of the questions, and the parts are gone.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

from vlmtune.utils.disk import replace_text
from vlmtune.utils.errors import CheckpointError
from vlmtune.utils.json_lines import as_line, parse_lines

logger = logging.getLogger(__name__)

_SCORES = 'metrics.json'  # what ``vlmtune test`` writes beside the rows
PredictionRow: TypeAlias = dict[str, Any]
"""One answer: index, where, question, images, image_sizes ([[width, height]]), references, prediction, prompt_tokens,
image_tokens, output_tokens, seconds, finish ('stop' or 'length') and scores ({metric: number}).

In parts only, a row that could not be asked after all has ``error`` and ``reason`` in place of an answer.
"""


class PredictionFile:
    """The file of one run of questions.

    Args:
        path: where the rows end up.
        fingerprint: of questions, settings and model; what was written under another one is not looked at;
            if it was finished, it moves to ``earlier_1``, ``earlier_2``, ... beside the file.
    """

    def __init__(self, path: Path, *, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self._about = path.with_name(f'{path.name}.about')
        self._part: Any = None

    def read(self) -> dict[int, PredictionRow]:
        """What is there already, by index."""
        found: dict[int, PredictionRow] = {}
        about = next(_read_lines(self._about), {})
        if about.get('fingerprint') == self.fingerprint:
            found = {row['index']: row for row in _read_lines(self.path)}
            found |= {row['index']: row for row in about.get('bad', [])}
        for part in self._parts():
            lines = _read_lines(part)
            if next(lines, {}).get('fingerprint') == self.fingerprint:
                found |= {row['index']: row for row in lines}
        return found

    def start(self, rows: Iterable[PredictionRow]) -> None:
        """Keep these rows and nothing else; the first rank calls it before any rank opens its part.

        Raises:
            CheckpointError: the folder cannot be written to.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._keep_finished()
            others = self._parts()
            _write_anew(self._part_of(0), [self._head, *rows])
            for old in (self._about, self.path, *others):
                if old != self._part_of(0):
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def _keep_finished(self) -> None:
        fingerprint = next(_read_lines(self._about), {}).get('fingerprint')
        if fingerprint in (None, self.fingerprint) or not self.path.is_file():
            return
        folders = (self.path.with_name(f'earlier_{i}') for i in count(1))
        folder = next(folder for folder in folders if not folder.exists())
        folder.mkdir()
        for file in (self.path, self._about, self.path.with_name(_SCORES)):
            if file.is_file():
                file.rename(folder / file.name)
        logger.warning('%s: answers of another model, or to other questions, were there; now in %s', self.path, folder)

    def open_part(self, rank: int) -> None:
        """Add to the part of this rank from now on.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._part = self._part_of(rank).open('a' if rank == 0 else 'w', encoding='utf-8')
        except OSError as error:
            raise self._unwritable(error) from error
        if rank != 0:
            self.add([self._head])

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows, to be found after a kill.

        Raises:
            CheckpointError: the disk is full.
        """
        try:
            self._part.write(''.join(map(as_line, rows)))
            self._part.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Close the part of this rank."""
        if self._part is not None:
            self._part.close()
            self._part = None

    def remove_part(self, rank: int) -> None:
        """Remove the part of this rank, whose disk the first rank may not see; once ``finish`` is done."""
        self._part_of(rank).unlink(missing_ok=True)

    def finish(self, rows: Sequence[PredictionRow], *, bad: Sequence[PredictionRow]) -> None:
        """Put all rows into the file and remove the parts; the first rank calls it."""
        write_rows(self.path, rows)
        _write_anew(self._about, [{**self._head, 'bad': list(bad)}])
        for part in self._parts():
            part.unlink(missing_ok=True)

    @property
    def _head(self) -> dict[str, Any]:
        return {'fingerprint': self.fingerprint}

    def _part_of(self, rank: int) -> Path:
        return self.path.with_name(f'{self.path.name}.part{rank}')

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f'{self.path.name}.part*'))

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f'predictions cannot be written to {self.path.parent}: {error.strerror or error}')


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSONL file at once.

    Raises:
        CheckpointError: it cannot be written; the old one is as it was.
    """
    try:
        _write_anew(path, rows)
    except OSError as error:
        raise CheckpointError(f'{path} cannot be written: {error.strerror or error}') from error


def _write_anew(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    replace_text(path, ''.join(map(as_line, rows)))


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file."""
    if path.is_file():
        with path.open(encoding='utf-8', errors='replace') as file:
            yield from filter(None, parse_lines(file))
