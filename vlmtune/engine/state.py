"""What a run needs besides weights to go on as if it had not stopped, as plain numbers."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, MessageHub

_KEPT = 64  # values per scalar: more than the usual smoothing window looks at
_FLOAT, _PAIRS = '$float', '$pairs'


def to_json(state: Any) -> bytes:
    """Plain values as strict JSON: what JSON has no word for (nan, inf, keys that are numbers) is spelled out.

    Raises:
        TypeError: a value is not plain.
    """
    return json.dumps(_spell(state), allow_nan=False).encode()


def from_json(text: bytes) -> Any:
    """What was given to ``to_json``; tuples have become lists.

    Raises:
        ValueError: it is not JSON, or what is spelled out in it makes no sense.
    """
    return json.loads(text, object_hook=_unspell)


def _spell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _spell(item) for key, item in value.items()}
        return {_PAIRS: [[_spell(key), _spell(item)] for key, item in value.items()]}
    return [_spell(item) for item in value] if isinstance(value, list | tuple) else value


def _unspell(found: dict[str, Any]) -> Any:
    if found.keys() == {_FLOAT}:
        return float(found[_FLOAT])
    return dict(found[_PAIRS]) if found.keys() == {_PAIRS} else found


def rng_state() -> dict[str, Any]:
    """The state of every random generator of this process."""
    name, keys, *rest = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    state = dict(
        torch=torch.get_rng_state().tolist(),
        numpy=[name, np.asarray(keys).tolist(), *rest],
        python=[version, list(internal), gauss],
    )
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state().tolist()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Set what ``rng_state`` returned."""
    torch.set_rng_state(torch.tensor(state['torch'], dtype=torch.uint8))
    name, keys, *rest = state['numpy']
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state['cuda'], dtype=torch.uint8))


@contextmanager
def kept_rng() -> Iterator[None]:
    """Every random generator of this process is afterwards as it was, whatever happens inside."""
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(before)


def seeded_rng_state(words: Sequence[int]) -> dict[str, Any]:
    """The state of generators that were seeded with a function of some numbers; those of this process stay as they are.

    Args:
        words: not negative.
    """
    numpy_seed, python_seed, torch_seed = np.random.SeedSequence(words).generate_state(3).tolist()
    with kept_rng():
        np.random.seed(numpy_seed)
        random.seed(python_seed)
        torch.manual_seed(torch_seed)
        return rng_state()


def message_state(hub: MessageHub, *, window: int = 0) -> dict[str, Any]:
    """The recent history of every logged scalar.

    Args:
        hub: of the run.
        window: values that the log averages over.
    """
    state, kept = {}, max(window, _KEPT)
    for name, buffer in hub.log_scalars.items():
        values, counts = buffer.data
        state[name] = dict(values=values[-kept:].tolist(), counts=counts[-kept:].tolist())
    return state


def set_message_state(hub: MessageHub, state: dict[str, Any]) -> None:
    """Set what ``message_state`` returned."""
    for name, history in state.items():
        hub.log_scalars[name] = HistoryBuffer(history['values'], history['counts'])
