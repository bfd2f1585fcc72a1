"""What a run has written, read back: steps, validations, sample answers, test results, parts, config.

A folder may be that of a run that was killed, goes on, or is broken: what cannot be read is counted and left out.
"""

import ast
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from vlmtune.config.unrun import assignments, value_of
from vlmtune.engine.checkpoint import CONFIG_FILE
from vlmtune.engine.run_layout import (
    CHAT_FILE,
    METRICS_FILE,
    PARTS_FILE,
    PREDICTIONS_FILE,
    RESULT_FILE,
    TEST_FOLDER,
    VALIDATION_FILE,
    VALIDATION_FOLDER,
)
from vlmtune.evaluation.metrics import LESS_IS_BETTER
from vlmtune.utils.errors import ConfigError, UserError, one_line
from vlmtune.utils.json_lines import parse_json, parse_lines

_LARGEST = 1e18  # of numbers that are drawn, which leaves out infinity and NaN

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """Predictions of one model: ``summary`` is the content of ``metrics.json``, where there is one."""

    name: str
    rows: list[Row]
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One work dir.

    Attributes:
        name: the folder's.
        steps: rows of ``metrics.jsonl``, one per step; of a step that was done twice, the later one.
        validations: rows of ``validation.jsonl``, likewise.
        chats: rows of ``evaluate_chat.jsonl``, likewise.
        results: of tests; without any, of the last validation.
        parts: rows of the parts table.
        config: the resolved config of the last start, as Python text.
        starts: how often the run was started.
        notes: what could not be read.
    """

    name: str
    steps: list[Row]
    validations: list[Row]
    chats: list[Row]
    results: list[Result]
    parts: list[Row]
    config: str
    starts: int
    notes: list[str]

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) where the value is a finite number."""
        return numbers(self.steps, at='step', name=name)

    def validation_series(self, name: str) -> list[tuple[float, float]]:
        """(iteration, value), likewise."""
        return numbers(self.validations, at='iteration', name=name)


def read_runs(folders: Sequence[str]) -> list[Run]:
    """One run per work dir, under names that differ.

    Raises:
        UserError: a folder is missing, or no run has written into it.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if twice := [str(path) for path in paths if paths.count(path) > 1]:
        raise UserError(f'{twice[0]} is given twice; name each work dir once')
    names = _short_names(paths)
    return [_read_run(path, name) for path, name in zip(paths, names, strict=True)]


def numbers(rows: Sequence[Row], *, at: str, name: str) -> list[tuple[float, float]]:
    """(row[at], row[name]) of the rows in which the value is a finite number."""
    return [(row[at], row[name]) for row in rows if is_number(row.get(name))]


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def is_less_better(name: str, results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a score counts errors: as the last of ``results`` says, or else the built-in metric of that name."""
    told = {one: rule for row in results if isinstance(row.get('rules'), dict) for one, rule in row['rules'].items()}
    return told.get(name) == 'less' if name in told else name in ('loss', *LESS_IS_BETTER)


def _is_prediction(row: Row) -> bool:
    """Whether the sizes of its images, which the report calculates with, are pairs of numbers."""
    sizes = row.get('image_sizes') or []
    return isinstance(sizes, list) and all(
        isinstance(size, list) and len(size) == 2 and all(map(is_number, size)) for size in sizes
    )


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Names of the folders, with as many parents as it takes to tell them apart."""
    most = max(len(path.parts) for path in paths)
    for length in range(1, most + 1):
        names = ['/'.join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise UserError(f'WORK_DIR {folder}: no such folder; expected the work dir of a run')
    reader = _Reader(folder)
    logs = sorted(path.parent for path in folder.glob(f'*/{METRICS_FILE}'))
    steps = _later_wins([row for log in logs for row in reader.rows(log / METRICS_FILE, at='step')], at='step')
    validations = _later_wins(reader.rows(folder / VALIDATION_FILE, at='iteration'), at='iteration')
    chats = _later_wins(reader.rows(folder / CHAT_FILE, at='iteration'), at='iteration', same=('input', 'images'))
    results = [*reader.results(folder / TEST_FOLDER)] or [*reader.results(folder / VALIDATION_FOLDER)][-1:]
    if not (steps or validations or chats or results):
        raise UserError(
            f'WORK_DIR {folder}: no run has written here; expected {METRICS_FILE} in a log folder, {VALIDATION_FILE}, '
            f'{CHAT_FILE} or {TEST_FOLDER}/*/{PREDICTIONS_FILE}'
        )
    starts = sorted(path.parent for path in folder.glob(f'*/{CONFIG_FILE}') if path.parent.suffix != '.pth')
    parts = next((found for log in reversed(starts) if (found := reader.parts(log / PARTS_FILE))), [])
    config = reader.text(starts[-1] / CONFIG_FILE) if starts else ''
    return Run(name, steps, validations, chats, results, parts, config, max(len(logs), 1), reader.notes)


def _later_wins(rows: Sequence[Row], *, at: str, same: tuple[str, ...] = ()) -> list[Row]:
    """Without what a resumed run has done again, and without what lies behind the checkpoint that it resumed from."""
    kept: list[Row] = []
    for row in rows:
        while kept and kept[-1][at] > row[at]:
            kept.pop()
        kept.append(row)
    return [*{(row[at], *(json.dumps(row.get(name)) for name in same)): row for row in kept}.values()]


class _Reader:
    """Reads files and takes notes of what cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []

    def text(self, path: Path) -> str:
        try:
            return path.read_text('utf-8', errors='replace')
        except OSError as error:
            self._note(path, f'cannot be read ({error.strerror})')
            return ''

    def rows(self, path: Path, *, at: str, is_sound: Callable[[Row], bool] = lambda row: True) -> list[Row]:
        """The JSON objects of a file that have the integer ``at`` and are sound; a kill leaves a torn line."""
        if not path.is_file():
            return []
        found = [*parse_lines(self.text(path).split('\n'))]
        rows = [row for row in found if row and isinstance(row.get(at), int) and is_number(row[at]) and is_sound(row)]
        if bad := len(found) - len(rows):
            self._note(path, f'{bad} {"line" if bad == 1 else "lines"} could not be read')
        return rows

    def parts(self, path: Path) -> list[Row]:
        content = parse_json(self.text(path)) if path.is_file() else []
        return [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []

    def results(self, folder: Path) -> Iterator[Result]:
        """Of every folder inside; iter_9 before iter_10."""
        for path in sorted(folder.glob(f'*/{PREDICTIONS_FILE}'), key=lambda p: _natural(p.parent.name)):
            rows = {row['index']: row for row in self.rows(path, at='index', is_sound=_is_prediction)}
            summary = path.with_name(RESULT_FILE)
            content = parse_json(self.text(summary)) if summary.is_file() else {}
            if rows:
                name = path.parent.relative_to(self.folder).as_posix()
                yield Result(name, [*rows.values()], content if isinstance(content, dict) else {})

    def _note(self, path: Path, trouble: str) -> None:
        self.notes.append(f'{one_line(path.relative_to(self.folder).as_posix())}: {trouble}')


def _natural(name: str) -> list[tuple[int, str]]:
    pieces = ''.join(c if c.isdecimal() else f'\0{c}\0' for c in name).split('\0')
    return [(int(piece), '') if piece.isdecimal() else (-1, piece) for piece in pieces if piece]


# ---- the config, which is read and never run


def settings_of(config: str) -> dict[str, str]:
    """Every setting of a resolved config by its dotted name, values as Python text."""
    return {name: text for name, (text, _) in _settings(config).items()}


def _settings(config: str) -> dict[str, tuple[str, Any]]:
    """Text and value of every setting."""
    try:
        leaves = [leaf for name, node in assignments(config, name='') for leaf in _flatten(name, node)]
        return {name: (ast.unparse(node), value_of(node, {})) for name, node in leaves}
    except (ConfigError, RecursionError):
        return {}


def _flatten(name: str, node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == 'dict' and node.keywords:
        for keyword in node.keywords:
            yield from _flatten(f'{name}.{keyword.arg}', keyword.value)
    else:
        yield name, node


def image_folders(config: str) -> list[str]:
    """Every ``image_folder`` of a resolved config; those of tests and validation come first."""
    found = _settings(config)
    names = [name for name in found if name.rpartition('.')[2] == 'image_folder']
    values = [found[name][1] for name in sorted(names, key=lambda n: not n.startswith(('test', 'val')))]
    return [*dict.fromkeys(value for value in values if type(value) is str)]
