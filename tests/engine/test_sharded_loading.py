"""What cannot be done with weights in pieces is refused, and what is loaded is in pieces."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmtune.config import load_config
from vlmtune.engine.precheck import check_settings
from vlmtune.engine.sharded_loading import needs_images_everywhere
from vlmtune.utils.errors import ConfigError


def strategy(name):
    return dict(type='vlmtune.engine.DeepSpeedStrategy', config=name)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model.quantization': 'nf4'}, "quantization='nf4' and ZeRO-3: .* use --deepspeed zero2, or set"),
        ({'model.quantization': 'int8'}, "quantization='int8' and ZeRO-3"),
        ({'model.lora.use_dora': True}, 'use_dora and ZeRO-3: .* use --deepspeed zero2, or remove use_dora'),
        ({'tune': dict(llm=dict(mode='lora', use_dora=True))}, 'use_dora and ZeRO-3'),
        ({'vision_cache': 'cache'}, 'vision_cache and ZeRO-3: .* use --deepspeed zero2, or remove vision_cache'),
    ],
)
def test_refused_before_data_is_read(changes, message, write_recipe, tmp_path):
    cfg = load_config(
        str(write_recipe(tmp_path / 'recipe.py')), {k: v for k, v in changes.items() if k != 'vision_cache'}
    )
    cfg.merge_from_dict({k: v for k, v in changes.items() if k == 'vision_cache'})
    cfg.strategy = strategy('zero2')
    check_settings(cfg)
    for name in ('zero3', 'deepspeed_zero3_offload', {'zero_optimization': {'stage': 3}}):
        cfg.strategy = strategy(name)
        with pytest.raises(ConfigError, match=message):
            check_settings(cfg)


def test_which_strategies_need_images_in_every_batch():
    assert not needs_images_everywhere(None)
    assert not needs_images_everywhere(dict(type='vlmtune.engine.DDPStrategy'))
    assert all(needs_images_everywhere(strategy(name)) for name in ('zero1', 'zero2_offload', 'deepspeed_zero3'))


@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
    """What two ranks found, each."""
    folder = tmp_path_factory.mktemp('loading')
    # Where glibc shares its heap between long and short lived tensors, what is free cannot be given back.
    environment = {**os.environ, 'LOCAL_RANK': '0', 'MALLOC_MMAP_THRESHOLD_': '65536', 'OMP_NUM_THREADS': '1'}
    script = Path(__file__).with_name('sharded_ranks.py')
    done = subprocess.run(
        [sys.executable, script, folder], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads((folder / f'{rank}.json').read_text()) for rank in range(2)]


def test_no_rank_ever_holds_the_whole_model(loaded):
    """Its piece, the largest weight twice (gathered, and being gathered), and what Python needs meanwhile."""
    for found in loaded:
        assert found['whole'] > 200e6
        assert found['peak'] < found['whole'] / 2 + 2 * found['largest'] + 25e6 < 0.75 * found['whole']
        assert found['plain_peak'] > 0.8 * found['whole']  # looked at from outside, now and then


def test_sizes_are_those_of_the_whole_model(loaded):
    for found in loaded:
        for name in ('report', 'flops', 'memory', 'groups'):
            assert found[name]['sharded'] == found[name]['plain'], name
        assert found['left'] == []  # weights that are whole on this rank


def test_pieces_together_are_the_checkpoint(loaded):
    for found in loaded:
        assert found['apart'] == {'llama': 0.0, 'qwen3_vl_moe': 0.0, 'tied': 0.0}
        assert found['zero3_is_over']
