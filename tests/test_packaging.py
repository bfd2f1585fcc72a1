"""A wheel and an editable install both find the recipes and their bases, from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP_OPTIONS = ('--no-deps', '--no-build-isolation', '--no-index', '-q')
PROBE = """
from mmengine.config import read_base

with read_base():
    from vlmtune.presets.default_runtime import *

from mmengine.optim import OptimWrapper
from torch.optim import AdamW

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows
from vlmtune.engine import TrainLoop
from vlmtune.models import SupervisedFinetune

pretrained_model_name_or_path = 'org/model'
data_path = 'data.json'
image_folder = 'images'
lr = 2e-4
save_steps = 50

processor = dict(
    type=Processor, pretrained_model_name_or_path=pretrained_model_name_or_path, prompt_template='vicuna'
)
model = dict(
    type=SupervisedFinetune,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    tune=dict(vision_encoder='frozen', projector='full', llm='frozen'),
    dtype='float32',
)
train_dataset = dict(
    type=SupervisedDataset,
    rows=dict(type=load_rows, path=data_path),
    dataset_map_fn=dict(type=llava_map_fn),
    template_map_fn=dict(type=chat_template_map_fn),
    image_folder=image_folder,
    max_length=512,
)
train_dataloader = dict(dataset=train_dataset, batch_size=4, num_workers=0, pack_to_max_length=False)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=lr))
train_cfg = dict(type=TrainLoop, max_epochs=1, accumulative_counts=1)
default_hooks.checkpoint.interval = save_steps
randomness = dict(seed=1)
"""


def run(command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'
    return done.stdout


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """The tree that is packaged, with one more recipe, so that nothing is built inside the repository."""
    folder = tmp_path_factory.mktemp('checkout')
    for name in ('vlmtune', 'configs'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__', '*.pyc'))
    for name in ('setup.py', 'pyproject.toml', 'requirements.txt', 'constraints.txt', 'LICENSE', 'MANIFEST.in'):
        shutil.copy(ROOT / name, folder / name)
    (folder / 'configs' / 'probe').mkdir()
    (folder / 'configs' / 'probe' / 'packaging_probe.py').write_text(PROBE)
    return folder


@pytest.fixture(scope='module')
def wheel(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    run([sys.executable, '-m', 'pip', 'wheel', *PIP_OPTIONS, '-w', folder, checkout])
    return next(folder.glob('vlmtune-*.whl'))


@pytest.fixture(scope='module', params=['wheel', 'editable'])
def installed(request, checkout, tmp_path_factory):
    """The ``vlmtune`` command of a new environment that borrows every other package from this one."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / 'bin' / 'python'
    own = Path(run([python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))']).strip())
    (own / 'borrowed.pth').write_text(sysconfig.get_path('purelib'))
    what = [request.getfixturevalue('wheel')] if request.param == 'wheel' else ['-e', checkout]
    # --ignore-installed: leave alone what the borrowed packages contain
    run([sys.executable, '-m', 'pip', '--python', python, 'install', '--ignore-installed', *PIP_OPTIONS, *what])
    return folder / 'bin' / 'vlmtune'


@pytest.fixture
def elsewhere(tmp_path):
    """Options of a process that runs in an empty folder and sees no other vlmtune."""
    hidden = ('PYTHONPATH', 'NPROC_PER_NODE')
    return dict(cwd=tmp_path, env={name: value for name, value in os.environ.items() if name not in hidden})


def test_the_wheel_holds_recipes_presets_and_nothing_outside_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert 'vlmtune/configs/probe/packaging_probe.py' in names
    assert 'vlmtune/presets/default_runtime.py' in names
    presets = [name for name in names if name.startswith('vlmtune/presets/deepspeed/') and name.endswith('.json')]
    assert len(presets) == 5
    assert {name.split('/')[0].partition('-')[0] for name in names} == {'vlmtune'}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'vlmtune').rglob('*.py')}
    recipes = {f'vlmtune/{path.relative_to(ROOT).as_posix()}' for path in (ROOT / 'configs').rglob('*.py')}
    assert sources | recipes <= set(names)


def copy_probe(installed, elsewhere):
    """The copied recipe, relative to the folder that ``elsewhere`` stands in."""
    copied = run([installed, 'copy-cfg', 'packaging_probe', 'mine'], **elsewhere).strip()
    assert (elsewhere['cwd'] / copied).read_text() == PROBE
    return copied


def test_recipes_are_listed_copied_and_read_from_another_folder(installed, elsewhere):
    assert 'packaging_probe' in run([installed, 'list-cfg'], **elsewhere).split()
    copied = copy_probe(installed, elsewhere)
    assert copied == 'mine/packaging_probe.py'
    text = run([installed, 'print-cfg', copied, '--cfg-options', 'lr=1e-5'], **elsewhere)
    assert 'optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=1e-05))' in text
    assert 'checkpoint=dict(type=CheckpointHook, interval=50,' in text  # the base was found


def test_a_copied_recipe_trains_in_another_folder(installed, elsewhere, tiny_model, tiny_data):
    copied, data = copy_probe(installed, elsewhere), tiny_data('llava')
    options = [
        f'pretrained_model_name_or_path={tiny_model("llava")}',
        'plan_cache_dir=None',
        f'data_path={data.data_path}',
        f'image_folder={data.image_folder}',
        'save_steps=1',
        'lr=1e-5',
    ]
    run([installed, 'train', copied, '--cfg-options', *options], **elsewhere)
    work_dir = elsewhere['cwd'] / 'work_dirs' / 'packaging_probe'
    assert (work_dir / 'iter_1.pth' / 'manifest.json').is_file()
    assert 'lr = 1e-05' in next(work_dir.glob('*/config.py')).read_text()


def test_the_repository_itself_was_left_alone(installed):
    assert not (ROOT / 'vlmtune' / 'configs').exists()
    assert not (ROOT / 'build').exists()
