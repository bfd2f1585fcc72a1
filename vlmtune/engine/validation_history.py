"""The validations of a run so far: they lie in its checkpoints, and in ``validation.jsonl`` of its work dir."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmtune.engine.run_layout import VALIDATION_FILE, VALIDATION_FOLDER, lies_in
from vlmtune.utils.disk import replace_text
from vlmtune.utils.json_lines import as_line, parse_lines


def read_history(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a checkpoint knows.

    Raises:
        TypeError, ValueError, KeyError, AttributeError: it is no history.
    """
    return [{n: float(v) for n, v in row.items()} | {'iteration': int(row['iteration'])} for row in rows]


def tidy_validations(runner: Any) -> list[dict[str, Any]]:
    """Remove what an abandoned run has left behind the step at which this one begins; the first rank does it.

    Returns:
        What ``runner.validations`` lacks: the validation of that very step, made by a run that ended there. It was
        made behind the save, and a run that goes on longer does not repeat it.
    """
    done, work_dir, loop = runner.train_loop.steps_done, Path(runner.work_dir), runner.val_loop
    if runner.rank != 0:
        return []
    resume = runner.resume_setting
    elsewhere = isinstance(resume, str) and not lies_in(resume, work_dir)
    abandoned = elsewhere or not done
    for folder in (work_dir / VALIDATION_FOLDER).glob('iter_*'):
        number = folder.name.removeprefix('iter_')
        if number.isdigit() and (int(number) > done or (int(number) == done and abandoned)):
            shutil.rmtree(folder, ignore_errors=True)
    records, known = work_dir / VALIDATION_FILE, {row['iteration'] for row in runner.validations}
    if not records.exists():
        return []
    rows = [row for row in parse_lines(records.read_text('utf-8', errors='replace').split('\n')) if row]
    lost = abandoned or done in known or (loop is not None and loop.due(done))
    late = [] if lost else [row for row in rows if row.get('iteration') == done]
    kept = [row for row in rows if row.get('iteration') in known or row in late]
    replace_text(records, ''.join(as_line(row) for row in kept))
    scores = [{name: row[name] for name in row.get('rules', ()) if row.get(name) is not None} for row in late[-1:]]
    return [{'iteration': done, **row} for row in scores]
