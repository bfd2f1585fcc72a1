"""What a run knows of how good a checkpoint is: numbers for its model card."""

from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from vlmtune.engine.run_layout import NOT_METRICS, RESULT_FILE, TEST_FOLDER, VALIDATION_FILE
from vlmtune.utils.json_lines import parse_lines


def read_results(checkpoint: Path) -> dict[str, dict[str, float]]:
    """Metrics of ``iter_N.pth`` by where they come from, 'test' and 'validation'; files that are not there say nothing.

    A file that is broken says nothing, either, nor does a test that asked only the first questions (``--limit``).
    """
    work_dir, name = checkpoint.absolute().parent, checkpoint.name.removesuffix('.pth')
    iteration = name.rpartition('_')[2]
    tested = [result for result in _objects(work_dir / TEST_FOLDER / name / RESULT_FILE) if not result.get('limit')]
    lines = [row for row in _objects(work_dir / VALIDATION_FILE) if str(row.get('iteration')) == iteration]
    found = dict(test=_numbers(tested[-1].get('metrics')) if tested else {}, validation=_numbers(lines[-1:]))
    return {name: metrics for name, metrics in found.items() if metrics}


def _objects(path: Path) -> list[dict[str, Any]]:
    """A json object, or one in each line."""
    try:
        text = path.read_text('utf-8', errors='replace')
    except OSError:
        return []
    return [*filter(None, parse_lines([text] if path.suffix == '.json' else text.split('\n')))]


def _numbers(found: Any) -> dict[str, float]:
    row = found[0] if isinstance(found, list) and found else found
    if not isinstance(row, Mapping):
        return {}
    numbers = {name: value for name, value in row.items() if isinstance(value, Real) and not isinstance(value, bool)}
    return {name: float(value) for name, value in numbers.items() if name not in NOT_METRICS}
