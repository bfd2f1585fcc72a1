"""A recipe is read as it is written; an override reaches all that follows from it; mistakes name their line."""

import subprocess
import sys
from pathlib import Path

import pytest

from vlmtune.config import load_config
from vlmtune.utils.errors import ConfigError


def messages(path, overrides=None):
    with pytest.raises(ConfigError) as failure:
        load_config(path, overrides)
    return str(failure.value)


def line_of(path, text):
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if line.startswith(text))


def test_plain_reading_resolves_derived_values(recipe):
    cfg = load_config(recipe)
    assert cfg.train_dataset.rows.path == 'data/mix/train.json'
    assert cfg.model.lora == dict(r=8, alpha=16)
    assert cfg.default_hooks.checkpoint.interval == 50
    assert cfg.filename == str(recipe)
    assert not set(cfg.keys()) & {'Model', 'read_base', 'load_rows', '__file__'}


def test_override_of_a_setting_reaches_everything_derived_from_it(recipe):
    cfg = load_config(recipe, {'lr': 1e-5, 'lora_r': 3, 'max_epochs': 4, 'data_root': 'x', 'save_steps': 7})
    assert cfg.lr == cfg.optim_wrapper.optimizer.lr == 1e-5
    assert cfg.model.lora == dict(r=3, alpha=6)
    assert cfg.train_cfg.max_epochs == 4
    assert cfg.train_dataloader.dataset.rows.path == 'x/train.json'
    assert cfg.default_hooks.checkpoint.interval == 7
    assert cfg.experiment_name == 'x-1e-05-1.0'


def test_deep_keys_are_applied_afterwards(recipe):
    cfg = load_config(recipe, {'optim_wrapper.optimizer.lr': 3, 'custom_hooks.1.every_n_iters': 5, 'lr': 0.1})
    assert (cfg.lr, cfg.optim_wrapper.optimizer.lr) == (0.1, 3)
    assert [hook.every_n_iters for hook in cfg.custom_hooks] == [10, 5]


def test_deep_key_wins_over_the_line_that_edits_the_same_leaf(recipe):
    assert load_config(recipe, {'default_hooks.checkpoint.interval': 3}).default_hooks.checkpoint.interval == 3


def test_deep_key_of_a_setting_is_set_before_the_setting_is_read(recipe):
    cfg = load_config(recipe, {'tune.llm': 'full', 'train_dataset.max_length': 9})
    assert cfg.model.tune == dict(vision_encoder='frozen', llm='full')
    assert cfg.train_dataloader.dataset.max_length == 9


def test_whole_parts_can_be_overridden_and_keys_in_them_too(recipe):
    cfg = load_config(recipe, {'visualizer.init': 3, 'visualizer': {}, 'work_dir': 'w', 'default_hooks': {'a': None}})
    assert cfg.visualizer == {'init': 3}
    assert cfg.work_dir == 'w'
    assert cfg.default_hooks == {'a': None}


def test_a_class_setting_is_overridden_by_name(recipe, parts):
    for value in ('Constructor', f'{parts}.Constructor'):
        cfg = load_config(recipe, {'optim_type': value})
        assert cfg.optim_wrapper.optimizer.type.__name__ == 'Constructor'


@pytest.mark.parametrize(
    ('new', 'says'),
    [
        ('lr = 2e-4\nlr = 1e-4', 'assigned again at'),
        ('lr = 2e-4\nlr *= 2', 'changed in place at'),
        ('if batch_size:\n    lr = 2e-4', 'set inside `if` at'),
        ('lr = 2e-4\nfor i in (1, 2):\n    lr = i * 1e-4', 'set inside `for` at'),
        ('lr = weight = 2e-4\nload_from = weight', 'set together with other names at'),
        ('lr, weight = 2e-4, 1\nload_from = weight', 'set together with other names at'),
    ],
)
def test_an_ambiguous_setting_cannot_be_overridden(edit, new, says):
    path = edit('lr = 2e-4', new)
    load_config(path)  # it may be written
    message = messages(path, {'lr': 1e-5})
    assert says in message
    assert 'declare it once' in message


def test_edited_settings_cannot_be_overridden(edit):
    path = edit('lora_r = 8', "lora_r = 8\ntune['llm'] = 'full'")
    assert 'edited at' in messages(path, {'tune': {}})
    assert load_config(path, {'tune.llm': 'frozen'}).model.tune.llm == 'frozen'


def test_deep_override_of_a_name_that_is_changed_after_its_use(edit):
    path = edit('# PART 5', "train_dataset['max_length'] = 5")
    message = messages(path, {'train_dataset.max_length': 9})
    assert 'is used at' in message
    assert 'changed after that' in message


def test_unknown_names_come_with_the_nearest(recipe):
    assert "'lora_rr', did you mean 'lora_r'?" in messages(recipe, {'lora_rr': 1})
    assert "model has no key 'lorra', did you mean 'lora'?" in messages(recipe, {'model.lorra.r': 1})
    assert 'custom_hooks has the entries 0 to 1' in messages(recipe, {'custom_hooks.2.x': 1})
    assert "default_hooks has no key 'checkpont', did you mean 'checkpoint'" in messages(
        recipe, {'default_hooks.checkpont': None}
    )
    assert 'so nothing can be set inside it' in messages(recipe, {'lr.x': 1})


@pytest.mark.parametrize(
    ('theirs', 'ours'),
    [
        ('learning_rate', 'lr'),
        ('per_device_train_batch_size', 'batch_size'),
        ('gradient_accumulation_steps', 'accumulative_counts'),
        ('num_train_epochs', 'max_epochs'),
        ('lora_rank', 'lora_r'),
        ('llava_name_or_path', 'pretrained_model_name_or_path'),
        ('resume_from', 'resume'),
        ('lr_config', 'param_scheduler'),
    ],
)
def test_other_tools_names_lead_to_ours(recipe, edit, theirs, ours):
    assert f'{theirs!r} is called {ours!r} here' in messages(recipe, {theirs: 1})
    assert f'{theirs!r} is called {ours!r} here' in messages(edit('', f'{theirs} = 1'))


def test_a_setting_that_a_recipe_lacks_is_told_with_what_it_has(recipe):
    assert "'max_iters' is called 'max_steps' here; this recipe has 'max_epochs' instead" in messages(
        recipe, {'max_iters': 2}
    )
    assert "'max_steps': this recipe has 'max_epochs' instead" in messages(recipe, {'max_steps': 2})
    assert "'template' is called 'prompt_template' here; this recipe has no such setting" in messages(
        recipe, {'template': 'x'}
    )


def test_a_name_that_nothing_uses_is_a_mistake_and_a_used_one_is_not(edit):
    path = edit('', 'warmup_ration = 0.1')
    message = messages(path)
    assert message.startswith(f'{path}:{line_of(path, "warmup_ration")}: ')
    assert "did you mean 'warmup_ratio'?" in message
    assert load_config(edit('', 'my_own = 3\nload_from = my_own')).load_from == 3
    assert "setting 'seed'; nothing in the file uses it" in messages(edit('', 'seed = 1'))


def test_all_mistakes_are_listed_at_once(edit):
    path = edit('', 'warmup_ration = 0.1')
    message = messages(path, {'lrr': 1, 'batch_size': 'two', 'model.x.y': 1, 'max_grad_norm': 1})
    assert message.startswith(f'5 mistakes in {path}:\n')
    for part in ('warmup_ration', 'lrr', "batch_size: expected a positive integer, got 'two'", 'model.x.y', 'max_norm'):
        assert part in message


def test_check_adds_its_mistakes_to_the_others(recipe):
    with pytest.raises(ConfigError, match='2 mistakes') as failure:
        load_config(recipe, {'lrr': 1}, check=lambda cfg: [f'lr is {cfg.lr}'])
    assert 'lr is 0.0002' in str(failure.value)


def test_syntax_error_gives_file_line_and_what(edit):
    path = edit('lora_r = 8', 'lora_r = = 8')
    assert messages(path).startswith(f'{path}:{line_of(path, "lora_r")}:10: syntax error: invalid syntax')


@pytest.mark.parametrize(
    ('new', 'says'),
    [
        ('lora_r = undefined_name', "NameError: name 'undefined_name' is not defined"),
        ('lora_r = 1 / 0', 'ZeroDivisionError'),
        ('default_hooks.nope.interval = 1', 'AttributeError'),
    ],
)
def test_a_failing_line_is_named(edit, new, says):
    path = edit('lora_r = 8', f'lora_r = 8\n{new}' if '.nope' in new else new)
    message = messages(path)
    assert f'{path}:{line_of(path, new)}: ' in message
    assert says in message


def test_functions_and_objects_have_their_place(edit):
    assert "'collate' is defined in the config; move it" in messages(edit('', 'def collate():\n    pass'))
    assert 'model.dtype: only type= may hold an object' in messages(edit('tune=tune,', 'tune=tune, dtype=load_rows,'))
    assert 'experiment_name: holds PosixPath' in messages(
        edit('', "from pathlib import Path\nexperiment_name = Path('x')")
    )


def test_mmengines_older_base_style_is_explained(edit):
    assert 'write `with read_base()' in messages(edit('', "_base_ = ['x.py']"))


def test_only_python_is_read(tmp_path):
    (tmp_path / 'x.yaml').write_text('a: !!python/object/apply:os.system ["touch hacked"]')
    assert 'only Python configs (.py) are read, got .yaml' in messages(tmp_path / 'x.yaml')
    assert 'not found' in messages(tmp_path / 'missing.py')
    assert 'is a folder' in messages(tmp_path)
    (tmp_path / 'binary.py').write_bytes(b'\xff\xfe\x00')
    assert 'cannot be read as Python text' in messages(tmp_path / 'binary.py')


def test_reading_imports_neither_torch_nor_transformers(tmp_path):
    path = tmp_path / 'lazy.py'
    path.write_text(
        'from torch.optim import AdamW\nfrom transformers import AutoModel\nimport torch.nn as nn\n'
        'optim_wrapper = dict(optimizer=dict(type=AdamW, lr=1))\nmodel = dict(type=AutoModel, x=dict(type=nn.Linear))\n'
    )
    code = (
        'import sys; from vlmtune.config import *; '
        f'cfg = load_config({str(path)!r}, {{"optim_wrapper.optimizer.lr": 2}}); dump_config(cfg, {str(path)!r}); '
        f'load_config({str(path)!r}); '
        'assert not {"torch", "transformers", "peft"} & set(sys.modules); '
        'assert cfg.optim_wrapper.optimizer.lr == 2; print("lazy")'
    )
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == 'lazy\n'


class TestUsersModules:
    def test_the_object_beside_the_config_builds_from_any_folder(self, recipe, tmp_path, monkeypatch):
        monkeypatch.chdir('/')
        cfg = load_config(recipe)
        assert cfg.train_dataset.map_fn.type({'a': 1}, answer='yes') == {'a': 1}
        assert sys.path[-1] == str(tmp_path)

    def test_dotted_relative_import(self, write):
        path = write('from .PARTS import Model\nmodel = dict(type=Model)\n', 'relative.py')
        assert load_config(path).model.type.__name__ == 'Model'

    def test_nothing_is_put_on_the_path_without_need(self, write):
        before = list(sys.path)
        load_config(write('from torch.optim import SGD\nmodel = dict(type=SGD)\n', 'plain.py'))
        assert sys.path == before

    def test_missing_and_hidden_modules(self, write, tmp_path):
        path = write(
            'import no_such_module\nfrom pytest import mark\n'
            'model = dict(type=mark.x, y=dict(type=no_such_module.X))\n',
            'hidden.py',
        )
        (tmp_path / 'pytest.py').write_text('')
        message = messages(path)
        assert "hidden.py:1: no module 'no_such_module' is installed, and none lies beside the config" in message
        assert "hidden.py:2: the module 'pytest' beside the config is hidden by" in message


def test_unknown_builtin_names_list_the_nearest(monkeypatch, tmp_path):
    names = ['llava_1_5_7b_lora_mix665k', 'qwen2_5_vl_3b_lora_vqa']
    monkeypatch.setattr('vlmtune.recipes.recipe_root', lambda: tmp_path)
    for name in names:
        (tmp_path / f'{name}.py').write_text("work_dir = 'here'\n")
    assert load_config('llava_1_5_7b_lora_mix665k').work_dir == 'here'
    assert 'the nearest are qwen2_5_vl_3b_lora_vqa' in messages('qwen2_5_vl_lora')
    assert isinstance(load_config('qwen2_5_vl_3b_lora_vqa').filename, str)
    assert Path(load_config('qwen2_5_vl_3b_lora_vqa').filename).parent == tmp_path


def test_a_setting_that_may_not_be_none_here(tmp_path):
    (tmp_path / 'recipe.py').write_text('max_epochs = 3\nwarmup = 0.1 * max_epochs\n')
    with pytest.raises(ConfigError, match=r'recipe.py:2: TypeError: .*; a setting that is None is reckoned with here$'):
        load_config(str(tmp_path / 'recipe.py'), {'max_epochs': None})
