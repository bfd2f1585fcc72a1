"""One place for every setting: what a DeepSpeed file says otherwise is an error, what it leaves open is filled."""

import json
import math

import pytest
import torch
from mmengine.config import ConfigDict
from torch.optim import SGD, AdamW

from vlmtune.engine.deepspeed_config import PRESETS, RunSettings, check_deepspeed, fill_config, read_config
from vlmtune.utils.errors import ConfigError

DEFAULTS = dict(lr=2e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
RUN = RunSettings(
    dtype=torch.bfloat16,
    max_norm=1.0,
    batch_size=1,
    optimizer='AdamW',
    optimizer_settings=DEFAULTS,
    accumulative_counts=2,
    ranks=4,
)
HUGGING_FACE = {
    'fp16': dict(enabled='auto', loss_scale=0, loss_scale_window=1000, initial_scale_power=12, hysteresis=2),
    'bf16': dict(enabled='auto'),
    'optimizer': dict(type='AdamW', params=dict(lr='auto', betas='auto', eps='auto', weight_decay='auto')),
    'scheduler': dict(
        type='WarmupLR', params=dict(warmup_min_lr='auto', warmup_max_lr='auto', warmup_num_steps='auto')
    ),
    'zero_optimization': dict(
        stage=3,
        offload_optimizer=dict(device='cpu', pin_memory=True),
        reduce_bucket_size='auto',
        stage3_prefetch_bucket_size='auto',
        stage3_param_persistence_threshold='auto',
        sub_group_size=1e9,
    ),
    'gradient_accumulation_steps': 'auto',
    'gradient_clipping': 'auto',
    'steps_per_print': 2000,
    'train_batch_size': 'auto',
    'train_micro_batch_size_per_gpu': 'auto',
}


def autos(value):
    if isinstance(value, dict):
        return sum(autos(v) for v in value.values())
    return int(value == 'auto')


def test_presets():
    names = sorted(path.stem for path in PRESETS.glob('*.json'))
    assert names == ['zero1', 'zero2', 'zero2_offload', 'zero3', 'zero3_offload']
    for name in names:
        filled = fill_config(read_config(name), RUN)
        assert filled['zero_optimization']['stage'] == int(name[4])
        assert ('offload_optimizer' in filled['zero_optimization']) == name.endswith('offload')
        assert autos(filled) == 0
        assert read_config(f'deepspeed_{name}') == read_config(name)  # XTuner's word


def test_a_hugging_face_file_is_filled_from_the_run():
    filled = fill_config(HUGGING_FACE, RUN)
    assert autos(HUGGING_FACE) == 16
    assert autos(filled) == 0
    assert 'optimizer' not in filled
    assert 'scheduler' not in filled
    assert (filled['gradient_accumulation_steps'], filled['train_micro_batch_size_per_gpu']) == (1, 1)
    assert filled['gradient_clipping'] == 1.0
    assert filled['bf16'] == dict(enabled=True, check_grad_overflow=True)
    assert filled['fp16']['enabled'] is False
    assert filled['zero_optimization'] == dict(
        stage=3, offload_optimizer=dict(device='cpu', pin_memory=True), sub_group_size=1e9
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_precision_is_the_models(dtype):
    filled = fill_config(HUGGING_FACE, RUN._replace(dtype=dtype))
    assert filled['bf16']['enabled'] is (dtype == torch.bfloat16)
    assert filled['fp16']['enabled'] is (dtype == torch.float16)
    assert filled['fp16']['initial_scale_power'] == 12


def test_no_clipping_is_0():
    assert fill_config(read_config('zero2'), RUN._replace(max_norm=math.inf))['gradient_clipping'] == 0.0


def test_the_same_said_twice_is_fine():
    config = dict(
        zero_optimization=dict(stage=2),
        bf16=dict(enabled=True),
        fp16=dict(enabled=False),
        gradient_accumulation_steps=2,
        gradient_clipping=1,
        train_micro_batch_size_per_gpu=1,
        train_batch_size=8,
        optimizer=dict(type='AdamW', params=dict(lr=2e-4, betas=[0.9, 0.999])),
    )
    assert fill_config(config, RUN)['gradient_accumulation_steps'] == 1


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (dict(gradient_accumulation_steps=4), 'steps is 4, but train_cfg.accumulative_counts is 2'),
        (dict(gradient_clipping=0.5), 'gradient_clipping is 0.5, but optim_wrapper.clip_grad.max_norm is 1.0'),
        (dict(bf16=dict(enabled=False)), 'bf16.enabled is False, but model.dtype is bfloat16, which decides'),
        (dict(fp16=dict(enabled=True)), 'fp16.enabled is True, but model.dtype is bfloat16'),
        (dict(bf16=dict(enabled=True), fp16=dict(enabled=True)), 'fp16.enabled is True'),
        (dict(train_batch_size=16), r'train_batch_size is 16, but batch_size x accumulative_counts x processes is 8'),
        (dict(train_micro_batch_size_per_gpu=3), 'is 3, but train_dataloader.batch_size is 1'),
        (dict(optimizer=dict(type='Lion')), 'optimizer.type is Lion, but optim_wrapper.optimizer is AdamW'),
        (dict(optimizer=dict(params=dict(lr=3e-5))), 'optimizer.params.lr is 3e-05, but .* has 0.0002'),
        (dict(optimizer=dict(params=dict(betas=[0.8, 0.999]))), r'betas is \[0.8, 0.999\], but .* \(0.9, 0.999\)'),
        (dict(scheduler=dict(type='WarmupLR', params=dict(warmup_num_steps=9))), 'has warmup_num_steps=9, but'),
        (dict(zero_optimization=dict(stage=0)), 'stage is 0, expected 1, 2 or 3; without ZeRO, run'),
        (dict(zero_optimization=None), 'stage is None, expected 1, 2 or 3'),
        (dict(zero_optimization=dict(stage=3, offload_param=dict(device='nvme'))), 'device is nvme, which'),
        (dict(zero_optimization=dict(stage=2, round_robin_gradients=True)), 'round_robin_gradients is True, exp'),
        (dict(amp=dict(enabled=True)), 'amp.enabled is True, expected False: precision comes from model.dtype'),
        (
            dict(zero_optimization=dict(stage=1), data_types=dict(grad_accum_dtype='fp32')),
            'grad_accum_dtype is fp32 in stage 1 with bfloat16, .*; use stage 2',
        ),
    ],
)  # fmt: skip
def test_a_contradiction_names_both(wrong, message):
    with pytest.raises(ConfigError, match=message):
        fill_config({**dict(zero_optimization=dict(stage=2)), **wrong}, RUN)


def test_all_at_once():
    config = dict(zero_optimization=dict(stage=2), gradient_accumulation_steps=4, gradient_clipping=0.5)
    with pytest.raises(ConfigError, match=r'^DeepSpeed configuration: gradient_clipping is.*; gradient_acc.* is 4'):
        fill_config(config, RUN)


# ---- of a run's config


def recipe(strategy, **changes):
    return ConfigDict(
        strategy=strategy,
        model=dict(dtype='bfloat16'),
        optim_wrapper=dict(optimizer=dict(type=AdamW, lr=2e-4), clip_grad=dict(max_norm=1.0)),
        train_dataloader=dict(batch_size=1),
        train_cfg=dict(accumulative_counts=2),
        **changes,
    )


def test_a_run_is_checked_before_anything_is_loaded(tmp_path):
    path = tmp_path / 'mine.json'
    path.write_text(json.dumps(dict(HUGGING_FACE, optimizer=dict(type='Adam', params=dict(lr=2e-4, eps=1e-8)))))
    check_deepspeed(recipe(dict(config=str(path))), ranks=2)
    check_deepspeed(recipe(dict(config='zero3')), ranks=2)
    check_deepspeed(recipe(None), ranks=2)
    path.write_text(json.dumps(dict(HUGGING_FACE, gradient_accumulation_steps=8)))
    with pytest.raises(ConfigError, match='gradient_accumulation_steps is 8, but train_cfg.accumulative_counts is 2'):
        check_deepspeed(recipe(dict(config=str(path))), ranks=2)
    wrong = recipe(dict(config=dict(HUGGING_FACE)))
    wrong.optim_wrapper.optimizer = dict(type=SGD, lr=0.1)
    with pytest.raises(ConfigError, match='optimizer.type is AdamW, but optim_wrapper.optimizer is SGD'):
        check_deepspeed(wrong, ranks=2)


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        (
            'zero4',
            None,
            r'zero4: not a preset \(zero1, zero2, zero2_offload, zero3, zero3_offload\) and not a json file',
        ),
        ('a.json', '{', 'a.json is not valid json'),
        ('a.json', '[1]', 'a.json holds a list, expected an object'),
    ],
)
def test_what_cannot_be_read(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
        name = str(tmp_path / name)
    with pytest.raises(ConfigError, match=message):
        read_config(name)


def test_a_strategy_that_is_a_word():
    with pytest.raises(
        ConfigError, match="strategy='deepspeed_zero3': expected dict.* --deepspeed zero1, zero2 or zero3"
    ):
        check_deepspeed(ConfigDict(strategy='deepspeed_zero3'), ranks=1)
