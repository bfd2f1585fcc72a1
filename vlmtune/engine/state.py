"""What a run needs besides weights to go on as if it had not stopped, as plain numbers."""

import random
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, MessageHub

_KEPT = 64  # values per scalar: more than any smoothing window looks at


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


def message_state(hub: MessageHub) -> dict[str, Any]:
    """The recent history of every logged scalar."""
    state = {}
    for name, buffer in hub.log_scalars.items():
        values, counts = buffer.data
        state[name] = dict(values=values[-_KEPT:].tolist(), counts=counts[-_KEPT:].tolist())
    return state


def set_message_state(hub: MessageHub, state: dict[str, Any]) -> None:
    """Set what ``message_state`` returned."""
    for name, history in state.items():
        hub.log_scalars[name] = HistoryBuffer(history['values'], history['counts'])
