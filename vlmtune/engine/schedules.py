"""Learning rate schedules written in epochs, run in optimizer steps."""

from collections.abc import Mapping, Sequence
from typing import Any

_IN_EPOCHS = ('begin', 'end', 'T_max', 'step_size', 'total_steps', 'milestones')
_SHORTEST = 2  # steps of a schedule


def schedules_in_steps(
    schedules: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, max_steps: int, max_epochs: float
) -> list[dict[str, Any]]:
    """Convert schedules with ``convert_to_iter_based``; others pass through.

    Epochs, also fractions of one, are scaled so that ``max_epochs`` lands exactly on ``max_steps``. A warm-up that
    becomes shorter than two steps (3 % of a run of 10) is left out: mmengine refuses an empty one, and one of a single
    step would leave the learning rate at its start factor for the whole run.
    """
    converted = []
    for schedule in [schedules] if isinstance(schedules, Mapping) else schedules:
        schedule = dict(schedule)
        if schedule.pop('convert_to_iter_based', False) and schedule.get('by_epoch', True):
            schedule['by_epoch'] = False
            for name in _IN_EPOCHS:
                if (value := schedule.get(name)) is not None:
                    times = max_steps / max_epochs
                    schedule[name] = [round(v * times) for v in value] if name == 'milestones' else round(value * times)
        begin, end = schedule.get('begin', 0), schedule.get('end')
        if end is None or end - begin >= _SHORTEST:
            converted.append(schedule)
    return converted
