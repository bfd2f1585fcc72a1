"""Where the time of an optimizer step goes: waiting for data, vision, language model, optimizer.

On CUDA the marks are events, read once at the end of the step; nothing waits in its middle. Elsewhere they are the
process's own clock. Cost per micro-batch: two marks for each forward and backward of the vision modules, microseconds.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from vlmtune.models import SupervisedFinetune

Mark: TypeAlias = torch.cuda.Event | float


class StepTimes(NamedTuple):
    """Seconds of one optimizer step, of this rank.

    Attributes:
        data: until every rank has its batches; the step waits for the slowest.
        vision: forward of vision encoder and projector, and their backward where gradients flow through them.
        llm: the rest of forward and backward: language model, head, loss, copies to the device, and the exchange of
            gradients that outlasts them.
        optimizer: clipping and update.
    """

    data: float = 0.0
    vision: float = 0.0
    llm: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


class StepClock:
    """Times the steps of a model.

    The loop calls, in this order: ``start``, ``data_arrived``, ``micro_batch_done`` after each, ``learned``, ``stop``.

    Args:
        model: its vision modules get forward hooks, which do nothing outside of a step.
        device: where it runs.
    """

    def __init__(self, model: SupervisedFinetune, *, device: torch.device) -> None:
        self.device = device
        self._running = False
        self._spans: list[tuple[Mark, Mark]] = []  # of vision
        self._entered: list[Mark] = []
        self._backward_began: Mark | None = None
        for module in _vision_modules(model):
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

    def start(self) -> None:
        """A step begins; it waits for its batches."""
        self._started = time.perf_counter()

    def data_arrived(self) -> None:
        """Every rank has its batches. The device is idle."""
        self._waited = time.perf_counter() - self._started
        self._spans.clear()
        self._running, self._computing = True, self._mark()

    def micro_batch_done(self) -> None:
        """The backward pass of a micro-batch is over; that of vision comes last in it."""
        if self._backward_began is not None:
            self._spans.append((self._backward_began, self._mark()))
            self._backward_began = None

    def learned(self) -> None:
        """All gradients are there."""
        self._learned = self._mark()

    def stop(self) -> StepTimes:
        """The step is over."""
        done = self._mark()
        self._running = False
        if isinstance(done, torch.cuda.Event):
            done.synchronize()
        vision = sum(_seconds(first, last) for first, last in self._spans)
        passes = _seconds(self._computing, self._learned)
        return StepTimes(self._waited, vision, max(passes - vision, 0.0), _seconds(self._learned, done))

    def cancel(self) -> None:
        """The step has failed; forget it."""
        self._running, self._backward_began = False, None
        self._spans.clear()
        self._entered.clear()

    # ---- hooks

    def _mark(self) -> Mark:
        if self.device.type != 'cuda':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if self._running:
            self._entered.append(self._mark())

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._running:
            return
        self._spans.append((self._entered.pop(), self._mark()))
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._backward_begins)

    def _backward_begins(self, gradient: Tensor) -> None:
        """The gradient of a vision output is there; what autograd still has to do was computed before it: vision."""
        if self._running and self._backward_began is None:
            self._backward_began = self._mark()


def _seconds(first: Mark, last: Mark) -> float:
    if isinstance(first, torch.cuda.Event):
        assert isinstance(last, torch.cuda.Event)
        return first.elapsed_time(last) / 1000
    assert isinstance(last, float)
    return last - first


def _vision_modules(model: SupervisedFinetune) -> list[nn.Module]:
    """Vision encoder and projector; of modules inside one another, the outer one."""
    paths = [*model.family.vision_encoder, *model.family.projector]
    outer = [path for path in paths if not any(path.startswith(other + '.') for other in paths)]
    return [model.model.get_submodule(path) for path in outer]


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a module's output, whatever it is packed in."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
