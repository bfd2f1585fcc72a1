import math

import pytest
from mmengine.config import Config

from vlmtune.config import config_text, dump_config, load_config
from vlmtune.utils.errors import ConfigError


def dumped(cfg, folder):
    folder.mkdir(parents=True, exist_ok=True)
    dump_config(cfg, folder / 'config.py')
    return folder / 'config.py'


def test_a_dump_reloads_equal_twice_and_from_another_folder(recipe, tmp_path, monkeypatch):
    cfg = load_config(recipe, {'lr': 1e-5})
    first = dumped(cfg, tmp_path / 'work')
    again = load_config(first)
    second = load_config(dumped(again, tmp_path / 'other' / 'work'))
    monkeypatch.chdir('/')
    assert cfg.to_dict() == again.to_dict() == second.to_dict()
    assert 'torch.' not in first.read_text()
    assert second.train_dataset.map_fn.type('row', answer='') == 'row'  # the user's module is found again
    assert str(tmp_path) in first.read_text()


def test_settings_of_a_dump_cannot_be_overridden_but_deep_keys_can(recipe, tmp_path):
    path = dumped(load_config(recipe), tmp_path / 'work')
    for name in ('lr', 'tune.llm'):
        with pytest.raises(ConfigError, match='is a dumped config, where nothing follows its settings'):
            load_config(path, {name: 1})
    cfg = load_config(path, {'optim_wrapper.optimizer.lr': 3, 'resume': True, 'work_dir': 'x'})
    assert (cfg.optim_wrapper.optimizer.lr, cfg.resume, cfg.work_dir) == (3, True, 'x')


def test_values_of_every_plain_kind_survive(write, tmp_path):
    path = write(
        """
        from collections import OrderedDict
        import torch.nn
        import torch.optim as optim
        from torch.nn import Linear
        from transformers import AutoModel
        from PARTS import Model as Linear2, Optimizer

        big = float('inf')
        small = -big
        model = dict(
            type=AutoModel.from_pretrained, a=dict(type=torch.nn.Linear), b=dict(type=optim.SGD), c=dict(type=Linear),
            d=dict(type=Linear2), e=dict(type=OrderedDict), f=dict(type=Optimizer.from_name),
            numbers=(1, -2.5, 1e-12, True, None, big, small), one=(1,), none=(), empty=[{}, [], ''],
            keys={1: 'a', 'not-a-name': 2, 'class': 3, ('a', 1): 4}, text='quote \\' \\n "two" \\\\ end',
            data=b'\\x00', few={3, 1}, long=['x' * 50, 'y' * 50, dict(z='w' * 50)], uni='é漢🙂',
        )
        SGD = 'a setting with the name of a class'
        load_from = SGD
        """
    )
    cfg = load_config(path)
    again = load_config(dumped(cfg, tmp_path / 'work'))
    assert again.to_dict() == cfg.to_dict()
    assert type(again.model.numbers[3]) is bool
    assert again.model.numbers[-1] == -math.inf
    for key in ('a', 'b', 'c', 'd', 'e', 'f'):
        assert again.model[key].type == cfg.model[key].type
    assert again.model.type.__qualname__ == cfg.model.type.__qualname__


def test_secrets_never_reach_a_dump(write, tmp_path):
    path = write(
        """
        hf_token = 'SECRET-1'
        pad_token = 'kept-1'
        visualizer = dict(
            vis_backends=[
                dict(init_kwargs=dict(api_key='SECRET-2', mlflow_tracking_token='SECRET-3')),
                dict(init_kwargs=dict(key='SECRET-4', project='kept-2')),
            ],
            uri='https://me:SECRET-5@host/x',
        )
        model = dict(password='SECRET-6', token=hf_token, auth=dict(WANDB_API_KEY='SECRET-7'), image_token=pad_token,
                     max_new_tokens=3, wandb_api_key=None)
        """
    )
    cfg = load_config(path)
    text = config_text(cfg)
    assert 'SECRET' not in text
    assert text.count('<secret removed>') == 8
    assert 'kept-1' in text
    assert 'kept-2' in text
    assert cfg.hf_token == 'SECRET-1'  # the run itself still has it
    assert load_config(dumped(cfg, tmp_path / 'work')).model.max_new_tokens == 3


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(ConfigError, match=r'model\.x: holds <object'):
        dump_config(Config(dict(model=dict(x=object()))), tmp_path / 'x.py')
    assert not (tmp_path / 'x.py').exists()
