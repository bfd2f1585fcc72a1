"""ZeRO on two real ranks, by strategies without a Runner (zero_ranks.py): resume to the bit, layouts, norms, drops.

One start of the processes does many checks; each test looks at one.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlmtune.engine.deepspeed import import_deepspeed

ZERO = ('zero1', 'zero2', 'zero2_offload', 'zero3')
ALL = ('ddp', *ZERO, 'zero3_offload')
QUICK = (
    *(f'{check}_{kind}' for check in ('resume', 'dropped', 'not_finite') for kind in ZERO),
    *('resume_zero2_bfloat16', 'resume_zero3_bfloat16', 'resume_zero2_nf4', 'not_finite_zero2_bfloat16'),
    *('cross_zero2', 'equal', 'groups_zero2', 'groups_zero3', 'float16_single', 'float16_zero2', 'raises_8bit'),
)
THOROUGH = (
    *(f'resume_{kind}{more}' for kind in ALL for more in ('', '_bfloat16', '_momentum', '_8bit')),
    *('resume_ddp_nf4', 'resume_zero1_nf4', 'resume_ddp_adafactor', 'resume_zero2_adafactor'),
    *(f'dropped_{kind}{more}' for kind in ALL for more in ('', '_bfloat16', '_nan', '_early')),
    *(f'not_finite_{kind}{more}' for kind in ALL for more in ('', '_bfloat16', '_unclipped')),
    *(f'groups_{kind}' for kind in ALL if kind != 'ddp'),
    *(f'float16_{kind}' for kind in ALL),
    *('cross_zero3', 'cross_single', 'cross_bfloat16', 'equal_unclipped', 'equal_nf4'),
    *('raises_8bit_back', 'raises_adafactor'),
)
CPU_ADAM = ('resume_zero2_offload_cpu_adam', 'resume_zero3_offload_cpu_adam', 'cross_cpu_adam', 'cross_to_cpu_adam')


def run_checks(folder, model, checks, *, ranks=2):
    """Start the ranks; returns a function from the name of a check to what the first rank found."""
    if not (folder / 'model').exists():
        (folder / 'model').symlink_to(model)
    script = Path(__file__).with_name('zero_ranks.py')
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={ranks}']
    done = subprocess.run([*launch, script, folder, *checks], capture_output=True, text=True, timeout=1500)

    def found(check):
        paths = [folder / f'{check}_{rank}.json' for rank in range(ranks)]
        assert all(path.is_file() for path in paths), done.stderr[-5000:]
        return json.loads(paths[0].read_text())

    return found


@pytest.fixture(scope='module')
def quick(tiny_model, tmp_path_factory):
    return run_checks(tmp_path_factory.mktemp('quick'), tiny_model('qwen2'), QUICK)


@pytest.fixture(scope='module')
def thorough(tiny_model, tmp_path_factory):
    return run_checks(tmp_path_factory.mktemp('thorough'), tiny_model('qwen2'), THOROUGH)


def by_kind(prefix):
    """A test over the quick checks, and the same one over the thorough ones."""
    quick = [pytest.param('quick', name, id=name) for name in QUICK if name.startswith(prefix)]
    rest = [name for name in THOROUGH if name.startswith(prefix) and name not in QUICK]
    thorough = [pytest.param('thorough', name, id=name, marks=pytest.mark.slow) for name in rest]
    assert quick, prefix
    return pytest.mark.parametrize(('run', 'name'), [*quick, *thorough])


@by_kind('resume_')
def test_a_resumed_run_ends_with_the_same_bits(run, name, request):
    """Weights, every state of the optimizer on every rank, and norms; two groups have another lr than the third."""
    found = request.getfixturevalue(run)(name)
    assert found['different'] == []
    assert found['norms'][2:] == found['again']
    assert found['moved'] > 1e-3
    sharded = name.startswith('resume_zero')
    assert [f for f in found['files'] if f != 'model.safetensors'] == [
        f'optimizer_{rank}.safetensors' for rank in range(2 if sharded else 1)
    ]


@by_kind('cross_')
def test_state_loads_under_another_strategy(run, name, request):
    """Moments, step counts and weights are what was saved, element for element; the next step differs by order."""
    found = request.getfixturevalue(run)(name)
    assert found['states'] == found['nonzero'] > 20
    bound = 1e-2 if 'bfloat16' in name else 2e-6
    assert len(found['found']) >= 2
    for target in found['found'].values():
        assert target.pop('goes_on') < bound
        assert len(target.pop('norms')) == 1
        assert target == dict(keys=True, states=0, weights=0)


@pytest.mark.slow
def test_state_loads_under_another_number_of_ranks(tiny_model, tmp_path):
    """Two ranks save, three load and save, one loads that."""
    run_checks(tmp_path, tiny_model('qwen2'), ['cross_zero2'])('cross_zero2')
    checks = ('cross_ranks_zero2', 'cross_ranks_zero3', 'resume_zero3', 'resume_zero1')
    found = run_checks(tmp_path, tiny_model('qwen2'), checks, ranks=3)
    for check in checks[:2]:
        assert found(check) == dict(ranks=3, files=3, states=[0, 0], weights=1)
    for check in checks[2:]:  # three do not divide the weights: there is padding
        assert found(check)['different'] == []
        assert found(check)['again'] == found(check)['norms'][2:]


@by_kind('equal')
def test_ranks_learn_what_one_process_learns(run, name, request):
    """Norms before clipping, and weights after three steps of SGD at 0.5; ranks have different numbers of tokens."""
    found = request.getfixturevalue(run)(name)
    assert min(found['norms']) > 0.7
    assert len(found['found']) == (3 if 'nf4' in name else len(ALL))
    for kind, distances in found['found'].items():
        assert distances['distance'] < 1e-6, kind
        assert distances['norms'] < 1e-6, kind


@by_kind('dropped_')
def test_dropped_micro_batches_leave_no_trace(run, name, request):
    assert request.getfixturevalue(run)(name) == dict(untouched=True, different=[])


@by_kind('not_finite_')
def test_a_step_that_is_not_finite_leaves_no_trace(run, name, request):
    """One rank's gradients are NaN, or infinite; the step after it is as if it had not been."""
    for found in request.getfixturevalue(run)(name).values():
        assert found['norm'] in ('nan', 'inf')
        assert found['different'] == []


@by_kind('float16_')
def test_float16_lowers_its_scale_and_goes_on(run, name, request):
    """The scale is in the checkpoint: the step after a resume is the same to the bit."""
    found = request.getfixturevalue(run)(name)
    assert [lowered for _, lowered in found['seen']] == [True] * 3
    assert {norm for norm, _ in found['seen']} <= {'nan', 'inf'}
    first = 1.0 if 'zero' in name else 0.5  # DeepSpeed lets one overflow pass
    assert found['scales'] == [first, first / 2, first / 4]
    assert found['kept']
    assert not found['lowered']
    assert found['norm'] == pytest.approx(1.45, abs=0.01)
    assert found['state']['scale'] == 65536 * first / 4
    assert (found['different'], found['same_scale']) == ([], True)


@by_kind('groups_')
def test_groups_keep_their_rate_and_decay(run, name, request):
    found = request.getfixturevalue(run)(name)
    assert found['groups'] == {'llm': [3e-3, 0.1], 'llm.no_decay': [3e-3, 0.0], 'lm_head': [1e-2, 0.1]}
    assert found['logged'] == {'llm_lr': [3e-3], 'lm_head_lr': [1e-2]}


@by_kind('raises_')
def test_state_that_cannot_be_cut_is_refused(run, name, request):
    found = request.getfixturevalue(run)(name)
    assert 'fits only the strategy and number of processes that saved it' in found['message']
    assert '--reset-optimizer' in found['message']
    assert found['untouched']


@pytest.mark.slow
def test_deepspeeds_own_adam(tiny_model, tmp_path):
    """It keeps powers of its betas to itself, so that a resume is exact to rounding; its state goes both ways."""
    found = run_checks(tmp_path, tiny_model('qwen2'), CPU_ADAM)
    for name in CPU_ADAM[:2]:
        assert found(name)['again'] == pytest.approx(found(name)['norms'][2:], rel=1e-5)
    for name in CPU_ADAM[2:]:
        assert found(name)['states'] == 78
        for target in found(name)['found'].values():
            assert (target['states'], target['weights']) == (0, 0)
            assert target['goes_on'] < 1e-5


def test_ninja_is_found_where_no_environment_is_activated(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'deepspeed', 'the library')
    monkeypatch.setenv('PATH', str(tmp_path))
    assert import_deepspeed() == 'the library'
    assert shutil.which('ninja')
    assert shutil.which('ninja', path=tmp_path) is None


def test_a_run_that_compiles_nothing_needs_no_ninja(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'deepspeed', 'the library')
    monkeypatch.setitem(sys.modules, 'ninja', None)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert import_deepspeed() == 'the library'
