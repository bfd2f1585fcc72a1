"""Parameter groups, clipping, and what happens to a step that is not finite."""

import json
import math

import pytest
import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import nn
from torch.optim import SGD, AdamW

from vlmtune.engine import PartwiseOptimWrapperConstructor
from vlmtune.engine.optim import StepOptimWrapper, build_optimizer, unwrap
from vlmtune.models import SupervisedFinetune
from vlmtune.utils.errors import ConfigError


@pytest.fixture
def model(tiny_model):
    def build(tune):
        return SupervisedFinetune(str(tiny_model('llava')), tune=tune, lora=dict(r=2), dtype='float32')

    return build


def construct(**settings):
    return PartwiseOptimWrapperConstructor({'type': OptimWrapper, 'optimizer': dict(type=AdamW, lr=1e-3), **settings})


def test_a_group_per_part_and_decay(model):
    tune = dict(vision_encoder=dict(mode='full', lr=1e-6), projector=dict(mode='full', lr=2e-3), llm='lora')
    net = model(tune)
    wrapper = construct(optimizer=dict(type=AdamW, lr=1e-4, weight_decay=0.1))(net)
    groups = {g['name']: (g['lr'], g['weight_decay']) for g in wrapper.optimizer.param_groups}
    assert groups == {
        'vision_encoder': (1e-6, 0.1),
        'vision_encoder.no_decay': (1e-6, 0.0),
        'projector': (2e-3, 0.1),
        'projector.no_decay': (2e-3, 0.0),
        'llm': (1e-4, 0.1),
    }
    assert wrapper.get_lr() == {'vision_encoder_lr': [1e-6], 'projector_lr': [2e-3], 'llm_lr': [1e-4]}
    grouped = [p for g in wrapper.optimizer.param_groups for p in g['params']]
    assert len(grouped) == len(net.named_trainable()) == len({id(p) for p in grouped})
    assert all(p.ndim > 1 or not g['weight_decay'] for g in wrapper.optimizer.param_groups for p in g['params'])


def test_one_rate_is_logged_as_one(model):
    assert construct()(model(dict(projector='full', llm='lora'))).get_lr() == {'lr': [1e-3]}


def test_frozen_weights_have_no_group(model):
    wrapper = construct()(model(dict(llm='lora')))
    assert sum(p.numel() for g in wrapper.optimizer.param_groups for p in g['params']) == 2 * 2 * (
        2 * 128 + 2 * 96 + 3 * 192
    )


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(type=AmpOptimWrapper), 'is not followed: precision comes from model.dtype; remove it'),
        (
            dict(accumulative_counts=4),
            r'optim_wrapper: accumulative_counts not followed; it takes optimizer and clip_grad',
        ),
        (dict(clip_grad=dict(max_norm=1, norm_type=1)), 'optim_wrapper: norm_type not followed'),
        (dict(optimizer=dict(type=AdamW)), 'optim_wrapper.optimizer has no lr'),
    ],
)
def test_settings_that_would_not_be_followed(settings, message):
    with pytest.raises(ConfigError, match=message):
        construct(**settings)


@pytest.mark.parametrize('betas', [(0.9, 1.5), 'x', 3])
def test_settings_that_the_optimizer_does_not_take_are_named(betas):
    with pytest.raises(ConfigError, match=r'^optim_wrapper.optimizer: lr=0.1, betas=.* is not taken \('):
        build_optimizer(dict(type=AdamW, lr=0.1, betas=betas), [nn.Parameter(torch.ones(1))])


def test_paramwise_settings_are_refused():
    with pytest.raises(ConfigError, match='optim_wrapper: paramwise_cfg not followed'):
        PartwiseOptimWrapperConstructor(dict(optimizer=dict(type=AdamW, lr=1)), dict(norm_decay_mult=0))


# ---- the step


def stepper(*gradients, max_norm=float('inf')):
    layers = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in gradients])
    for parameter, gradient in zip(layers, gradients, strict=True):
        parameter.grad = torch.tensor([gradient])
    return layers, StepOptimWrapper(SGD(layers, lr=1.0), max_norm=max_norm)


def test_the_norm_before_clipping_is_returned_and_gradients_are_cleared():
    layers, wrapper = stepper(3.0, 4.0, max_norm=1.0)
    assert wrapper.clip_and_step() == 5.0
    torch.testing.assert_close(torch.cat(list(layers)), torch.tensor([0.4, 0.2]))
    assert all(p.grad is None for p in layers)


def test_without_a_limit_nothing_is_clipped():
    layers, wrapper = stepper(3.0, 4.0)
    wrapper.clip_and_step()
    assert [p.item() for p in layers] == [-2.0, -3.0]


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('max_norm', [1.0, float('inf')])
def test_gradients_that_are_not_finite_change_no_weight(bad, max_norm):
    """Clipping would spread one NaN over every weight."""
    layers, wrapper = stepper(bad, 4.0, max_norm=max_norm)
    assert not math.isfinite(wrapper.clip_and_step())
    assert [p.item() for p in layers] == [1.0, 1.0]
    assert all(p.grad is None for p in layers)
    assert not wrapper.lowered_loss_scale


def scaled(*, scale):
    """A weight of 1 whose gradient comes from a loss, as in float16."""
    weight = nn.Parameter(torch.ones(1))
    scaler = torch.amp.GradScaler('cpu', init_scale=scale)
    return weight, StepOptimWrapper(SGD([weight], lr=0.1), max_norm=1.0, scaler=scaler)


def test_the_norm_is_of_gradients_without_the_scale():
    weight, wrapper = scaled(scale=1024.0)
    wrapper.scale_loss(3 * weight.sum()).backward()
    assert weight.grad.item() == 3072.0
    assert wrapper.clip_and_step() == 3.0
    assert weight.item() == pytest.approx(0.9)
    assert not wrapper.lowered_loss_scale


@pytest.mark.parametrize(('scale', 'because_of_it'), [(4.0, True), (2.0, True), (1.0, False), (0.5, False)])
def test_a_scale_of_1_is_not_to_blame(scale, because_of_it):
    """A gradient that is not finite without a scale either is a failure of the run, which the loop has to see."""
    weight, wrapper = scaled(scale=scale)
    wrapper.scale_loss(float('inf') * weight.sum()).backward()
    assert not math.isfinite(wrapper.clip_and_step())
    assert (weight.item(), wrapper.lowered_loss_scale) == (1.0, because_of_it)
    assert wrapper.scaler_state() == dict(scale=scale / 2, good_steps=0)
    wrapper.scale_loss(weight.sum()).backward()
    wrapper.clip_and_step()
    assert not wrapper.lowered_loss_scale


def test_scaler_state_goes_through_json():
    _, wrapper = scaled(scale=8.0)
    _, other = scaled(scale=1024.0)
    other.load_scaler_state(json.loads(json.dumps(wrapper.scaler_state() | dict(good_steps=5))))
    assert other.scaler_state() == dict(scale=8.0, good_steps=5)
    other.load_scaler_state({})  # of a run in bfloat16
    assert other.scaler_state() == dict(scale=8.0, good_steps=5)
    _, plain = stepper(1.0)
    assert plain.scaler_state() == {}
    plain.load_scaler_state(other.scaler_state())


def test_unwrap():
    with pytest.raises(TypeError, match='the engine trains a SupervisedFinetune, got Linear'):
        unwrap(nn.Linear(1, 1))
