"""Trackers by one setting: TensorBoard for real, the others at their seam."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vlmtune.config import load_config
from vlmtune.engine.trackers import TRACKERS, Trackers, read_trackers
from vlmtune.utils.errors import ConfigError

PICTURE = np.zeros((4, 6, 3), np.uint8)
KEY = 'hf_' + 'k' * 30


@pytest.fixture(scope='module')
def read_events():
    def read(folder):
        (file,) = folder.glob('**/events.out.*')
        return EventAccumulator(str(file), size_guidance=dict(tensors=0, images=0, scalars=0)).Reload()

    return read


def texts(events, name):
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f'{name}/text_summary')]


def test_a_run_in_tensorboard(run, tiny_data, read_events):
    pictures = sorted(str(path) for path in tiny_data('llava', rows=17).image_folder.iterdir())[:3]
    asked = dict(questions=['What <b>colour</b>?', 'Which two?', 'Hello?'], pictures=[pictures[0], pictures[1:], None])
    work_dir = run('seen', recipe=asked, trackers='tensorboard', max_steps=2, max_epochs=None)
    (folder,) = work_dir.glob('*/tensorboard')
    events = read_events(folder)
    tags = events.Tags()
    assert {'loss', 'lr', 'grad_norm', 'tokens_per_second'} <= set(tags['scalars'])
    assert [event.step for event in events.Scalars('loss')] == [1, 2]
    assert set(tags['images']) == {'evaluate_chat/0', 'evaluate_chat/1/0', 'evaluate_chat/1/1'}
    assert [event.step for event in events.Images('evaluate_chat/1/1')] == [0, 2]
    first, last = texts(events, 'evaluate_chat/0')
    assert '    asked: What <b>colour</b>?' in first
    assert '    answer: ' in last
    assert 'lora_r = 4' in texts(events, 'config')[0]
    assert not list(work_dir.glob('*/vis_data'))


def test_without_trackers_nothing_is_written(run):
    work_dir = run('unseen', max_steps=1, max_epochs=None)
    assert not [path for path in work_dir.rglob('*') if 'tensorboard' in path.name or 'events' in path.name]


def test_a_run_that_fails_is_told_to_trackers(run, monkeypatch):
    ends = []
    fake = SimpleNamespace(
        config=lambda *a: None,
        scalars=lambda *a: None,
        text=lambda *a: None,
        close=lambda *, failed: ends.append(failed),
    )
    monkeypatch.setitem(TRACKERS, 'tensorboard', lambda folder, name: fake)
    run('whole', trackers='tensorboard', max_steps=1, max_epochs=None)
    assert ends == [False]
    monkeypatch.setattr('vlmtune.engine.loops.TrainLoop.run', lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run('broken', trackers='tensorboard', max_steps=1, max_epochs=None)
    assert ends == [False, True]


class Recorder:
    """Stands for a module: any attribute is one, any call is noted by its name and gives one."""

    def __init__(self, calls, name=''):
        self._calls, self._name = calls, name

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return Recorder(self._calls, f'{self._name}.{name}'.strip('.'))

    def __call__(self, *args, **options):
        self._calls.append((self._name, args, options))
        return Recorder(self._calls, f'{self._name}()')


OPTIONS = dict(wandb=dict(project='pages'), mlflow=dict(tags=dict(by='me')), swanlab=dict(project='pages'))


def faked(name, monkeypatch, tracking_uri=None):
    """The calls that a tracker's package will get, in place of the package."""
    calls = []
    fake = Recorder(calls)
    errors = SimpleNamespace(Error=OSError, MlflowException=OSError)
    object.__setattr__(fake, 'errors', errors)
    object.__setattr__(fake, 'exceptions', errors)
    object.__setattr__(fake, 'is_tracking_uri_set', lambda: tracking_uri is not None)
    object.__setattr__(fake, 'get_tracking_uri', lambda: tracking_uri)
    monkeypatch.setitem(sys.modules, name, fake)
    return calls


@pytest.fixture
def calls(monkeypatch, request, tmp_path):
    """What a tracker's package is called with while a small run is told to it."""
    name = request.param
    calls = faked(name, monkeypatch)
    recipe = tmp_path / 'recipe.py'
    plain = f"lr = 1e-3\nhub_token = '{KEY}'\nwords = 'a {KEY}'\nlong = 'x' * 900\n"
    recipe.write_text(plain + 'model = dict(lr=lr, long=long, t=hub_token, w=words)\n')
    trackers = Trackers(read_trackers({name: OPTIONS[name]}), folder=tmp_path / 'work' / 'log', name='run7')
    trackers.add_config(load_config(str(recipe)))
    trackers.add_scalars({'loss': np.float32(0.5), 'note': 'x'}, step=3)
    trackers.add_text('answers/0', f'the answer {KEY}', step=3)
    trackers.add_image('answers/0', PICTURE, step=3, caption=f'asked {KEY}')
    trackers.close(failed=True)
    trackers.close()
    return calls


def of(calls, name):
    return [(args, options) for called, args, options in calls if called == name]


@pytest.mark.parametrize('calls', ['wandb', 'mlflow', 'swanlab'], indirect=True)
def test_secrets_reach_no_tracker(calls):
    assert len(calls) >= 5
    assert KEY not in repr(calls)
    assert 'lr' in repr(calls)


@pytest.mark.parametrize('calls', ['wandb'], indirect=True)
def test_what_wandb_is_told(calls):
    ((_, started),) = of(calls, 'init')
    assert (started['project'], started['name']) == ('pages', 'run7')
    ((_, settings),) = of(calls, 'Settings')
    assert settings['console'] == 'off'
    assert settings['disable_code'] is settings['disable_git'] is settings['x_disable_meta'] is True
    assert of(calls, 'init().define_metric') == [(('*',), dict(step_metric='iteration'))]
    logged = [args[0] for args, _ in of(calls, 'init().log')]
    assert logged[0] == {'loss': 0.5, 'iteration': 3}
    assert [row.keys() - {'iteration'} for row in logged[1:]] == [{'answers/0/text'}, {'answers/0'}]
    assert of(calls, 'init().finish') == [((), dict(exit_code=1))]


@pytest.mark.parametrize('calls', ['mlflow'], indirect=True)
def test_what_mlflow_is_told(calls):
    ((_, opened),) = of(calls, 'MlflowClient')
    assert opened['tracking_uri'].startswith('sqlite:////')
    assert opened['tracking_uri'].endswith('/work/mlflow.db')
    assert max(len(value) for (_, value), _ in of(calls, 'entities.Param')) == 500  # what MLflow takes
    client = 'MlflowClient()'
    assert of(calls, f'{client}.create_run')[0][1] == dict(run_name='run7', tags=dict(by='me'))
    ((name, value, _, step), _), *rest = of(calls, 'entities.Metric')
    assert (name, value, step, rest) == ('loss', 0.5, 3, [])
    assert [args[2] for args, _ in of(calls, f'{client}.log_text')] == ['config.py', 'answers/0/iter_3.txt']
    assert of(calls, f'{client}.log_image')[0][0][2] == 'answers/0/iter_3.png'
    assert of(calls, f'{client}.set_terminated')[0][0][1] == 'FAILED'


@pytest.mark.parametrize(
    ('options', 'uri'), [({}, 'http://elsewhere'), (dict(tracking_uri='http://here'), 'http://here')]
)
def test_mlflow_writes_where_it_was_told_to(options, uri, monkeypatch, tmp_path):
    """It knows environment variables and more; the config comes first."""
    calls = faked('mlflow', monkeypatch, 'http://elsewhere')
    Trackers(dict(mlflow=options), folder=tmp_path, name='run7')
    assert of(calls, 'MlflowClient') == [((), dict(tracking_uri=uri))]


@pytest.mark.parametrize('calls', ['swanlab'], indirect=True)
def test_what_swanlab_is_told(calls):
    ((_, started),) = of(calls, 'init')
    assert (started['project'], started['name']) == ('pages', 'run7')
    assert of(calls, 'Settings')[0][1]['terminal'] == dict(proxy_type='none')
    logged = of(calls, 'log')
    assert [(*args[0], options['step']) for args, options in logged] == [
        ('config/text', 0), ('loss', 3), ('answers/0/text', 3), ('answers/0', 3)
    ]  # fmt: skip
    assert of(calls, 'finish')[0][1]['state'] == 'crashed'


@pytest.mark.parametrize(
    ('given', 'chosen'),
    [
        (None, {}),
        ('tensorboard', dict(tensorboard={})),
        (['tensorboard'], dict(tensorboard={})),
        ('tensorboard, tensorboard', dict(tensorboard={})),
        (dict(tensorboard=dict(flush_secs=5)), dict(tensorboard=dict(flush_secs=5))),
        (dict(tensorboard=None), dict(tensorboard={})),
    ],
)
def test_the_setting(given, chosen):
    assert read_trackers(given) == chosen


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ('tensorbord', "trackers: 'tensorbord' is none, did you mean 'tensorboard'"),
        (7, 'trackers=7: expected'),
        (
            dict(mlflow=dict(experimnet='pages')),
            "trackers.mlflow.experimnet: unknown argument, did you mean 'experiment'",
        ),
        (
            dict(tensorboard=dict(flush_sec=5)),
            "trackers.tensorboard.flush_sec: unknown argument, did you mean 'flush_secs'",
        ),
        (dict(mlflow=dict(name='mine')), 'trackers.mlflow.name: unknown argument'),
        (dict(tensorboard=dict(log_dir='elsewhere')), 'trackers.tensorboard.log_dir: unknown argument'),
        (dict(wandb=dict(api_key='x')), r'trackers.wandb.api_key: secrets are not read from configs'),
        (dict(mlflow=dict(tracking_uri='http://me:pass@host')), 'trackers.mlflow.tracking_uri: secrets'),
    ],
)
def test_settings_that_cannot_be(given, message, monkeypatch):
    faked('mlflow', monkeypatch)
    with pytest.raises(ConfigError, match=message):
        read_trackers(given)


def test_options_are_those_that_the_package_takes(monkeypatch):
    def init(project=None, name=None, dir=None, settings=None):
        raise AssertionError('nothing is started to find out')

    def init_of_any(project=None, log_dir=None, **kwargs):
        raise AssertionError('nothing is started to find out')

    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, 'swanlab', SimpleNamespace(init=init_of_any))
    own = dict(project='pages', name='mine')
    assert read_trackers(dict(wandb=own)) == dict(wandb=own)
    for wrong in ('projct', 'dir', 'settings'):
        with pytest.raises(ConfigError, match=rf'trackers.wandb.{wrong}: unknown argument.*; there are project, name$'):
            read_trackers(dict(wandb={wrong: 'x'}))
    assert read_trackers(dict(swanlab=dict(projct='pages'))) == dict(swanlab=dict(projct='pages'))


@pytest.mark.parametrize('name', ['tensorboard', 'wandb', 'mlflow', 'swanlab'])
def test_a_missing_package_is_told_with_the_command(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"trackers='{name}' needs .*{name}.*; pip install 'vlmtune\[{name}\]'"):
        read_trackers(name)


def test_trackers_and_a_visualizer_are_one_too_many(run):
    with pytest.raises(ConfigError, match='trackers and visualizer are both set; remove one of the two'):
        run('both', trackers='tensorboard', visualizer=dict(type='Visualizer'))
