"""A step that runs out of memory names its samples and what would fit."""

import re

import pytest
import torch

from vlmtune.apps.train import prepare_config
from vlmtune.engine import Runner
from vlmtune.engine.memory import Load, MemoryModel, Sharding
from vlmtune.engine.out_of_memory import what_would_fit
from vlmtune.models import SupervisedFinetune
from vlmtune.utils.device import is_out_of_memory
from vlmtune.utils.errors import TrainingError

GIB = 2**30


def allocate_too_much():
    torch.empty(1 << 50, dtype=torch.uint8)


def cuda_is_full():
    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 8 GiB')


@pytest.fixture
def failing_run(write_recipe, tmp_path):
    """Runs until the forward pass number ``at``, which fails; returns the message."""

    def go(fail, *, at=1, **overrides):
        cfg = prepare_config(
            str(write_recipe(tmp_path / 'recipe.py')), work_dir=str(tmp_path / 'run'), overrides=overrides
        )
        runner = Runner.from_cfg(cfg)
        passes = []

        def before_forward(module, inputs):
            passes.append(None)
            if len(passes) == at:
                fail()

        runner.model.register_forward_pre_hook(before_forward)
        with pytest.raises(TrainingError) as caught:
            runner.train()
        return str(caught.value), runner

    return go


@pytest.mark.parametrize('fail', [cuda_is_full, allocate_too_much])
def test_the_samples_of_the_pack_are_named(fail, failing_run):
    message, runner = failing_run(fail, at=4)  # the second micro-batch of the second step
    assert '\n' not in message
    pack = runner.train_loop.sampler.current_packs()[1]
    dataset = runner.train_dataloader.dataset
    tokens = sum(int(dataset.lengths[key.sample]) for key in pack)
    patches = sum(int(dataset.patches[key.sample]) for key in pack)
    assert message.startswith('out of memory at iteration 2 on cpu (')
    assert f'the micro-batch has {tokens:,} tokens and {patches:,} patches in {len(pack)} samples: ' in message
    for key in pack:
        sample = dataset.samples[key.sample]
        brings = f'{len(sample)} tokens' + (f', {len(sample.images)} image' if sample.images else '')
        assert f'{dataset.where(key.sample)} ({brings}' in message
    assert re.search(r'Estimated need .* GiB \(.* GiB without activations\), the device has .* GiB', message)


def test_at_most_eight_samples_are_named(failing_run):
    message, _ = failing_run(cuda_is_full, pack_to_max_length=False, batch_size=12, accumulative_counts=1)
    assert message.count(' tokens, ') + message.count(' tokens)') == 8
    assert ' and 4 more. ' in message
    assert 'batch_size=' in message
    assert 'max_length=' not in message


def test_other_failures_stay_what_they_are(write_recipe, tmp_path):
    cfg = prepare_config(str(write_recipe(tmp_path / 'recipe.py')), work_dir=str(tmp_path / 'run'))
    runner = Runner.from_cfg(cfg)

    def fail(module, inputs):
        raise RuntimeError('shapes differ')

    runner.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match='shapes differ'):
        runner.train()
    assert not is_out_of_memory(RuntimeError('shapes differ'))


@pytest.fixture
def memory(tiny_model):
    def make(tune, *, name='llava', sharding=None, **kwargs):
        model = SupervisedFinetune(str(tiny_model(name)), tune=tune, dtype='float32', **kwargs)
        return MemoryModel(model, state_bytes=8.0, sharding=sharding)

    return make


def test_advice_that_the_estimate_itself_accepts(memory):
    """Half of what the activations need is there: the lengths that are named fit by the same estimate."""
    model = memory(dict(projector='full', llm='lora'))
    load = Load(tokens=65536, patches=32768, supervised=600)
    now = model.estimate(load)
    capacity = int((now.fixed + (now.total - now.fixed) / 2) / 0.92)
    advice = what_would_fit(model, load, capacity=capacity, max_length=65536)
    length = int(re.search(r'max_length=(\d+)', advice)[1])
    patches = int(re.search(r'max_patches=(\d+)', advice)[1])
    assert 0.45 * 65536 < length < 0.55 * 65536
    assert model.estimate(Load(length, patches, 600)).total <= capacity
    assert 'gradient_checkpointing=True (' in advice
    assert "quantization='nf4' (" in advice


@pytest.mark.parametrize(
    ('name', 'setting'),
    [('qwen2_vl', 'max_pixels'), ('internvl', 'max_patches'), ('smolvlm', 'longest_edge'), ('llava', None)],
)
def test_the_image_setting_is_the_familys(memory, name, setting):
    model, load = memory(dict(llm='full'), name=name), Load(65536, 32768, 600)
    advice = what_would_fit(model, load, capacity=int(model.estimate(load).total / 1.5), max_length=65536)
    assert re.findall(r'(\w+) at \d+%', advice) == ([] if setting is None else [setting])


def test_advice_names_no_setting_that_is_set_or_cannot_be(memory):
    model = memory(dict(projector='full', llm='full'), gradient_checkpointing=True)
    advice = what_would_fit(model, Load(4096, 0, 600), capacity=GIB, max_length=4096)
    assert 'gradient_checkpointing' not in advice
    assert 'quantization' not in advice
    assert 'max_pixels' not in advice
    assert 'deepspeed' not in advice
    sharded = memory(dict(llm='full'), sharding=Sharding(stage=0, ranks=2))
    assert '--deepspeed zero3' in what_would_fit(sharded, Load(4096, 0, 600), capacity=GIB, max_length=4096)
    dora = memory(dict(llm='lora'), lora=dict(use_dora=True), sharding=Sharding(stage=0, ranks=2))
    assert 'deepspeed' not in what_would_fit(dora, Load(4096, 0, 600), capacity=GIB, max_length=4096)


def test_no_length_fits_where_the_weights_alone_do_not(memory):
    model = memory(dict(llm='full'))
    fixed = model.estimate(Load(0, 0, 0)).fixed
    advice = what_would_fit(model, Load(4096, 0, 600), capacity=int(fixed), max_length=4096)
    assert 'max_length' not in advice


def test_an_estimate_that_was_too_low_still_gives_smaller_lengths(memory):
    advice = what_would_fit(memory(dict(llm='lora')), Load(4096, 0, 600), capacity=80 * GIB, max_length=4096)
    assert int(re.search(r'max_length=(\d+)', advice)[1]) <= 0.9 * 4096
