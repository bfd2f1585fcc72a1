"""The time of a step is split without a rest, and vision's own backward counts as vision."""

from types import SimpleNamespace

import pytest
import torch

from vlmtune.engine import step_clock
from vlmtune.engine.step_clock import StepClock, StepTimes
from vlmtune.models import SupervisedFinetune

SLOW = 8.0  # seconds, on a clock that only our own pauses move
NOW = [0.0]


@pytest.fixture(autouse=True)
def clock_of_our_own(monkeypatch):
    monkeypatch.setattr(step_clock, 'time', SimpleNamespace(perf_counter=lambda: NOW[0]))


def pause():
    NOW[0] += SLOW


def batch_of(model):
    ids = torch.randint(10, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    ids[0, 1:10] = model.model.config.image_token_id
    return dict(input_ids=ids, labels=ids, position_ids=torch.arange(24)[None], pixel_values=torch.ones(1, 3, 42, 42))


class _Pause(torch.autograd.Function):
    """Passes a tensor on; its backward takes a while."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        pause()
        return gradient


def timed_step(model, clock, *, micro_batches=1):
    clock.start()
    pause()
    clock.data_arrived()
    for _ in range(micro_batches):
        model(**batch_of(model)).backward()
        clock.micro_batch_done()
    clock.learned()
    pause()
    return clock.stop()


@pytest.fixture
def build(tiny_model):
    def make(tune):
        model = SupervisedFinetune(str(tiny_model('llava')), tune=tune, dtype='float32')
        return model, StepClock(model, device=torch.device('cpu'))

    return make


def pause_forward(module, inputs):
    pause()


def pause_backward(module, inputs, output):
    return _Pause.apply(output)


BOTH = dict(projector='full', llm='lora')


def test_a_step_is_split_without_a_rest(build):
    model, clock = build(BOTH)
    assert timed_step(model, clock, micro_batches=2) == StepTimes(data=SLOW, vision=0, llm=0, optimizer=SLOW)
    assert StepTimes(1, 2, 3, 4).total == 10


def test_forward_of_vision_and_language_model(build):
    model, clock = build(BOTH)
    model.model.get_submodule('model.vision_tower.encoder').register_forward_pre_hook(pause_forward)
    model.model.get_submodule('model.multi_modal_projector').register_forward_pre_hook(pause_forward, prepend=False)
    model.model.get_submodule('model.language_model.layers.0').register_forward_pre_hook(pause_forward)
    times = timed_step(model, clock, micro_batches=3)
    assert (times.vision, times.llm) == (6 * SLOW, 3 * SLOW)


@pytest.mark.parametrize(
    ('slow', 'vision', 'llm'),
    [('model.multi_modal_projector.linear_1', SLOW, 0), ('model.language_model.layers.0.mlp', 0, SLOW)],
)
def test_backward_of_vision_and_language_model(slow, vision, llm, build):
    model, clock = build(BOTH)
    model.model.get_submodule(slow).register_forward_hook(pause_backward)
    times = timed_step(model, clock)
    assert (times.vision, times.llm) == (vision, llm)


def test_vision_that_gradients_do_not_reach_has_no_backward(build):
    model, clock = build(dict(llm='lora'))
    model.model.get_submodule('model.language_model.layers.0.mlp').register_forward_hook(pause_backward)
    assert timed_step(model, clock) == StepTimes(data=SLOW, vision=0, llm=SLOW, optimizer=SLOW)


def test_nothing_is_timed_outside_of_a_step(build):
    """Sample answers run the same modules."""
    model, clock = build(BOTH)
    model.model.get_submodule('model.vision_tower.encoder').register_forward_pre_hook(pause_forward)
    model(**batch_of(model))
    assert timed_step(model, clock).vision == SLOW


def test_a_step_that_failed_is_forgotten(build):
    model, clock = build(BOTH)
    clock.start()
    clock.data_arrived()
    model(**batch_of(model)).backward()
    pause()
    clock.cancel()
    assert timed_step(model, clock) == StepTimes(data=SLOW, vision=0, llm=0, optimizer=SLOW)


def test_a_text_model_has_no_vision(tiny_model):
    model = SupervisedFinetune(str(tiny_model('qwen2')), tune=dict(llm='lora'), dtype='float32')
    clock = StepClock(model, device=torch.device('cpu'))
    clock.start()
    clock.data_arrived()
    clock.learned()
    assert clock.stop().vision == 0
