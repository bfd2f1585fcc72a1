"""Who answers in the demo: a model, or two beside each other, and one thread in which they do."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmtune.apps.chat.answering import Answerer, load_answerer
from vlmtune.apps.export.adapters import refuse_checkpoint
from vlmtune.apps.export.processor_files import load_processor
from vlmtune.layouts import read_config
from vlmtune.structures import Conversation
from vlmtune.utils.adapter_folder import is_adapter, split_adapter
from vlmtune.utils.errors import ConfigError


@dataclass(frozen=True)
class Voice:
    """A model under a name.

    Attributes:
        name: what stands above its answers.
        answerer: the model.
        without_adapter: it answers with its adapter switched off.
    """

    name: str
    answerer: Answerer
    without_adapter: bool = False

    @property
    def takes_images(self) -> bool:
        """Whether pictures can be shown to it."""
        return self.answerer.processor.family.has_vision

    def answer(
        self,
        conversation: Conversation,
        write: Callable[[str], None],
        *,
        settings: Mapping[str, Any],
        seed: int | None,
        should_stop: Callable[[], bool],
    ) -> str:
        """The answer; see ``Answerer.answer``. ``seed`` makes a sampled one repeatable."""
        if seed is not None:
            torch.manual_seed(seed)
        with self.answerer.adapted.disable_adapter() if self.without_adapter else contextlib.nullcontext():
            return self.answerer.answer(conversation, write, settings=settings, should_stop=should_stop)


def load_voices(
    model: str, *, adapter: str | None = None, compare: str | None = None, bits: int | None = None
) -> tuple[Voice, ...]:
    """One voice, or with ``compare`` the one before and the one after the training.

    If ``compare`` is the base of the adapter, its weights are in memory once: before is after with the adapter off. Of
    two models that were loaded, as of two adapters of one base, weights that are equal are kept once.

    Args:
        model: a folder or a hub id; the folder of an adapter means its base and the adapter.
        adapter: a PEFT adapter on top of it.
        compare: a folder or a hub id, or the folder of an adapter; '' is the base of the adapter.
        bits: 4 or 8 loads quantised.

    Raises:
        UserError: something cannot be loaded.
    """
    for named in filter(None, (model, compare)):
        refuse_checkpoint(Path(named).expanduser())
    name = model if adapter is None else f'{model} + {adapter}'
    under, on_it = split_adapter(model, adapter)
    base = under if on_it is not None else None
    if compare == '':
        compare = base
        if compare is None:
            raise ConfigError(f'--compare alone: {model} has no adapter to switch off; name the model to compare with')
    if compare is not None:
        read_config(split_adapter(compare)[0])  # a name that is none is told before the other model is loaded
    answerer = load_answerer(model, adapter=adapter, bits=bits)
    if compare is None:
        return (Voice(name, answerer),)
    if base is not None and _is_same(base, compare):
        before = Voice(f'before: {compare}', _of_base(answerer, base), without_adapter=True)
        return before, Voice(f'after: {name}', answerer)
    other = load_answerer(compare, bits=bits)
    _keep_once(answerer.model, other.model)
    if is_adapter(Path(compare).expanduser()):
        return Voice(compare, other), Voice(name, answerer)
    return Voice(f'before: {compare}', other), Voice(f'after: {name}', answerer)


def _keep_once(model: nn.Module, other: nn.Module) -> None:
    """Let the second model use the first one's memory for the weights that both have."""
    theirs = dict(model.named_parameters())
    for name, weight in other.named_parameters():
        mine = theirs.get(name, weight)
        if (mine.device, mine.dtype) == (weight.device, weight.dtype) and torch.equal(mine, weight):
            weight.data = mine.data


def _is_same(one: str, other: str) -> bool:
    paths = Path(one).expanduser(), Path(other).expanduser()
    return one == other or (all(map(Path.exists, paths)) and paths[0].samefile(paths[1]))


def _of_base(answerer: Answerer, base: str) -> Answerer:
    """The same model with the processor of its base, which must not say tokens that the adapter has added."""
    rows = answerer.model.get_input_embeddings().get_parameter('weight').shape[0]
    added = list(range(read_config(base).get_text_config().vocab_size, rows))
    settings = {**answerer.settings, **(dict(suppress_tokens=added) if added else {})}
    return replace(answerer, processor=load_processor(base), settings=settings)


class Speaking:
    """One thread in which all answers are made, one after the other: they share a model, and a GPU."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix='answers')

    def stream(
        self,
        voice: Voice,
        conversation: Conversation,
        *,
        settings: Mapping[str, Any],
        seed: int | None,
        stop: threading.Event,
    ) -> Iterator[str]:
        """What has been said so far, again and again; the last is the whole answer.

        Whoever drops the iterator stops the answer.

        Raises:
            UserError: as ``Answerer.answer``.
        """
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        gone = threading.Event()

        def should_stop() -> bool:
            return gone.is_set() or stop.is_set()

        answer: Future[str] = self._pool.submit(
            voice.answer, conversation, pieces.put, settings=settings, seed=seed, should_stop=should_stop
        )
        answer.add_done_callback(lambda _: pieces.put(None))
        said = ''
        try:
            while (piece := pieces.get()) is not None:
                said += piece
                if pieces.empty():  # who draws slowly draws less often
                    yield said
            yield answer.result()
        finally:
            gone.set()
            answer.cancel()
