"""Learning rate schedules written in epochs, run in optimizer steps."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.engine.state import from_json, to_json

_IN_EPOCHS = ('begin', 'end', 'T_max', 'step_size', 'total_steps', 'milestones')
_SHORTEST = 2  # steps of a schedule
_MOVING = frozenset({'last_step', '_global_step', '_last_value', 'base_values', 'best', 'num_bad_epochs'})
"""What changes while a schedule runs, or follows from the learning rates; all else are settings."""


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


def schedule_states(schedulers: Sequence[Any]) -> list[dict[str, Any]]:
    """What built schedules have to remember, as plain values."""
    return [{name: value for name, value in s.state_dict().items() if not callable(value)} for s in schedulers]


def schedule_changes(schedulers: Sequence[Any], states: Any) -> list[str]:
    """In which settings built schedules differ from saved ones; empty if they can go on where those stood.

    Args:
        schedulers: of this run.
        states: ``schedule_states`` of another, back from JSON.
    """
    mine = from_json(to_json(schedule_states(schedulers)))  # as they would come back
    if not isinstance(states, list) or [_names(state) for state in states] != [_names(state) for state in mine]:
        return ['other schedules']
    return [
        f'{type(scheduler).__name__}.{name}={own[name]}, not {saved[name]}'
        for scheduler, own, saved in zip(schedulers, mine, states, strict=True)
        for name in sorted(own.keys() - _MOVING)
        if saved[name] != own[name]
    ]


def load_schedules(schedulers: Sequence[Any], states: Sequence[Mapping[str, Any]]) -> None:
    """Let schedules go on where saved ones of the same settings stood."""
    for scheduler, saved in zip(schedulers, states, strict=True):
        scheduler.load_state_dict({name: value for name, value in saved.items() if name in _MOVING})


def _names(state: Any) -> list[str]:
    return sorted(state) if isinstance(state, dict) else []


def fast_forward(schedulers: Sequence[Any], *, steps_of_epochs: Sequence[int]) -> None:
    """Bring schedules that were just built to where a run would have them after these steps.

    Args:
        schedulers: just built, over an optimizer with the learning rates of the config.
        steps_of_epochs: optimizer steps of every finished epoch, and of the one that is under way.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # mmengine misses the steps of the optimizer
        for epoch, steps in enumerate(steps_of_epochs):
            if epoch:
                _step(schedulers, by_epoch=True)
            for _ in range(steps):
                _step(schedulers, by_epoch=False)


def _step(schedulers: Sequence[Any], *, by_epoch: bool) -> None:
    for scheduler in schedulers:
        if scheduler.by_epoch is by_epoch:
            scheduler.step()
