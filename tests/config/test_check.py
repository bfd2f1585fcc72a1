import pytest

from vlmtune.config import check_config, config_mistakes, load_config
from vlmtune.utils.errors import ConfigError


@pytest.fixture
def mistakes(edit):
    """``mistakes(old, new)``: what is found in the test recipe with one text replaced (or appended, for '')."""

    def find(old='', new='', **options):
        cfg = load_config(edit(old, new))
        cfg.default_hooks = {}  # the engine's own hooks are not looked at here
        return config_mistakes(cfg, **options)

    return find


def test_a_right_config_has_none(mistakes):
    assert mistakes() == []


@pytest.mark.parametrize(
    ('old', 'new', 'says'),
    [
        ('tune=tune,', 'tun=tune,', "model.tun: unknown argument, did you mean 'tune'?"),
        ('tune=tune,', 'tun=tune,', "model: Model needs the argument 'tune'"),
        ('lora=dict(r=lora_r', 'lora=dict(rr=lora_r', "model.lora.rr: unknown argument, did you mean 'r'?"),
        (
            'path=data_path',
            'pat=data_path',
            "train_dataloader.dataset.rows.pat: unknown argument, did you mean 'path'?",
        ),
        ('path=data_path', 'split=data_path', "load_rows needs the argument 'path'"),
        ("map_fn=dict(type=map_fn, answer='yes')", 'map_fn=dict(type=map_fn)', "map_fn needs the argument 'answer'"),
        ('max_length=max_length', 'maxlen=max_length', "dataset: Dataset needs the argument 'max_length'"),
        (
            'batch_size=batch_size)',
            'bach_size=batch_size)',
            'train_dataloader.bach_size: unknown argument, did you mean',
        ),
        ('lr=lr)', 'learnrate=lr)', "optim_wrapper.optimizer: Optimizer needs the argument 'lr'"),
        ('every_n_iters=10 * i', 'every_n_iter=10 * i', 'custom_hooks.1.every_n_iter: unknown argument, did you mean'),
        ('type=Model,', "type='Modl',", "model.type: nothing is called 'Modl'"),
    ],
)
def test_wrong_arguments_are_named_with_the_nearest(mistakes, old, new, says):
    found = mistakes(old, new)
    assert any(says in mistake for mistake in found), found


def test_what_others_supply_is_not_missing(mistakes):
    assert mistakes('', 'train_cfg.pop("max_epochs")') == ["train_cfg: Loop needs the argument 'max_epochs'"]


def test_keys_of_mmengines_builders_are_known(mistakes):
    hook = "custom_hooks = [dict(type=Hook, priority='LOW')]"
    assert mistakes('', hook) == []
    scheduler = (
        'from mmengine.optim import CosineAnnealingLR, OptimWrapper\n'
        'param_scheduler = [dict(type=CosineAnnealingLR, eta_min=0.0, end=2, convert_to_iter_based=True)]\n'
        'optim_wrapper = dict(type=OptimWrapper, optimizer=optim_wrapper["optimizer"], clip_grad=dict(max_norm=1), '
        'paramwise_cfg=dict(a=1))'
    )
    assert mistakes('', scheduler) == []
    assert mistakes('', scheduler.replace('eta_min=', 'eta_mim=')) == [
        "param_scheduler.0.eta_mim: unknown argument, did you mean 'eta_min'?"
    ]


def test_constructor_is_a_class_too(mistakes, parts):
    line = f'from {parts} import Constructr\noptim_wrapper["constructor"] = Constructr'
    found = mistakes('', line)
    assert found == [f"optim_wrapper.constructor: {parts} has no 'Constructr', did you mean 'Constructor'?"]
    assert mistakes('', line.replace('Constructr', 'Constructor')) == []


def test_imports_that_fail_say_why(mistakes, tmp_path):
    (tmp_path / 'broken_module.py').write_text('raise RuntimeError("boom")')
    found = mistakes('', 'from broken_module import Thing\nmodel["lora"] = dict(type=Thing)')
    assert len(found) == 1
    assert found[0].startswith('model.lora.type: importing broken_module fails: RuntimeError')
    assert 'boom' in found[0]
    found = mistakes('', 'from vlmtune.nothing import Thing\nmodel["lora"] = dict(type=Thing)')
    assert found[0].startswith('model.lora.type: cannot import vlmtune.nothing')


def test_plain_data_with_a_key_type_is_left_alone(mistakes):
    assert mistakes('images=evaluation_inputs', "images=[*evaluation_inputs, dict(type='image', path='x.png')]") == []


def test_names_of_mmengines_registries_work(mistakes):
    line = "visualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend', save_dirr='x')])"
    assert mistakes('', line) == ["visualizer.vis_backends.0.save_dirr: unknown argument, did you mean 'save_dir'?"]


def test_dotted_names_are_imported(mistakes):
    assert mistakes('type=Model,', "type='collections.OrderedDict',") == []
    assert mistakes('type=Model,', "type='json.decoder.JSONDecodr',") == [
        "model.type: json.decoder has no 'JSONDecodr', did you mean 'JSONDecoder'?"
    ]


def test_required_names(mistakes):
    assert mistakes(required=['processor', 'model']) == ['processor is missing']


def test_check_config_raises_them_all(edit):
    path = edit('tune=tune,', 'tun=tune,')
    cfg = load_config(path)
    cfg.default_hooks = {}
    with pytest.raises(ConfigError, match=f'2 mistakes in {path}'):
        check_config(cfg)


@pytest.mark.parametrize(
    ('setting', 'value', 'says'),
    [
        ('data_path', -3, 'train_dataloader.dataset.rows.path: expected a text, got -3'),
        ('image_folder', ['x'], "train_dataloader.dataset.image_folder: expected a text or None, got ['x']"),
        ('tune', 'lora', "model.tune: expected a dict, got 'lora'"),
        ('prompt_template', ['x', 1], "processor.prompt_template: expected a text or None, got ['x', 1]"),
        ('attn_implementation', True, 'model.attn_implementation: expected a text, got True'),
        ('SYSTEM', 5, 'custom_hooks.1.system: expected a list (each a text or None) or a text or None, got 5'),
        ('evaluation_images', ['x.png', 1.5, None], 'got ['),
        ('val_interval', '10', "val_cfg.interval: expected an integer or None, got '10'"),
        ('lora_r', 'x', "lora_r: expected a positive integer, got 'x'"),  # one line: it has a rule
        (
            'max_epochs',
            'x',
            "max_epochs: expected a positive number, to 100,000, got 'x'",
        ),  # before the file fails of it
        ('max_epochs', 1e9, 'max_epochs: expected a positive number, to 100,000, got'),  # would plan for ever
        ('seed', 2**32, 'seed: expected an integer, 0 to 4294967295, or None, got 4294967296'),  # numpy takes none
        ('val_cfg', 3, 'val_cfg: expected a dict, got 3'),
        (
            'train_dataloader.dataset',
            dict(type='vlmtune.data.MixedDataset', datasets=5),
            'train_dataloader.dataset.datasets: expected a list (each a dict), got 5',
        ),
        ('optim_type', None, 'optim_wrapper.optimizer.type: expected a class or a function, got None'),
    ],
)
def test_values_of_a_wrong_kind_are_told_with_the_kind_that_is_expected(setting, value, says):
    """All recipes pass the same check in tests/test_configs.py, so it asks nothing that they do not give."""
    with pytest.raises(ConfigError) as caught:
        load_config('quickstart_lora', {setting: value}, check=config_mistakes)
    assert says in str(caught.value)
    assert setting != 'lora_r' or 'mistakes' not in str(caught.value)
