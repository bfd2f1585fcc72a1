"""The state of torch optimizers in files: read by other cuts, refused where it cannot be; without DeepSpeed."""

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.optim import SGD, Adam, AdamW

from vlmtune.engine.optimizer_reader import FragmentRecord, SavedState
from vlmtune.engine.optimizer_state import Unit, load_optimizer_state, optimizer_file, save_optimizer_state
from vlmtune.utils.disk import hash_file
from vlmtune.utils.errors import CheckpointError

SHAPES = {'a': (3, 5), 'b': (7,), 'c': (1,), 'd': (2, 2, 2)}
TOTAL = 15 + 7 + 1 + 8


def whole(make=AdamW, **settings):
    """An optimizer over the parameters themselves, in two groups."""
    torch.manual_seed(1)
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    groups = [
        dict(name='first', params=[parameters['a'], parameters['b']], lr=0.1),
        dict(name='second', params=[parameters['c'], parameters['d']], lr=0.2),
    ]
    units = [Unit(p, (FragmentRecord(name, 0, p.numel(), 0),)) for name, p in parameters.items()]
    return make(groups, **settings), units


def cut(bounds, rank, make=AdamW, **settings):
    """An optimizer over one flat stretch per group, with padding behind, as a rank under ZeRO has it."""
    groups, units = [], []
    for number, names in enumerate((['a', 'b'], ['c', 'd'])):
        low, high = (bounds[number][rank], bounds[number][rank + 1])
        fragments, at = [], 0
        for name in names:
            numel = torch.Size(SHAPES[name]).numel()
            first, last = max(low, at), min(high, at + numel)
            if first < last:
                fragments.append(FragmentRecord(name, first - at, last - first, first - low))
            at += numel
        flat = nn.Parameter(torch.zeros(high - low + 3))
        units.append(Unit(flat, tuple(fragments)))
        groups.append(dict(name=('first', 'second')[number], params=[flat], lr=0.1))
    return make(groups, **settings), units


def step(optimizer, times=1):
    for _ in range(times):
        for group in optimizer.param_groups:
            for parameter in group['params']:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def moments(optimizer, units, key='exp_avg'):
    """Parameter -> flattened state, gathered from units."""
    found = {name: torch.full(shape, torch.nan).flatten() for name, shape in SHAPES.items()}
    for unit in units:
        for name, start, numel, offset in unit.fragments:
            found[name][start : start + numel] = optimizer.state[unit.tensor][key].flatten()[offset:][:numel]
    return torch.cat([*found.values()])


BOUNDS = {1: [[0, 22], [0, 9]], 2: [[0, 11, 22], [0, 4, 9]], 3: [[0, 8, 16, 22], [0, 1, 9, 9]]}


def save_all(folder, ranks, seed=3):
    """Ranks save after two steps of their own; returns what they hold together."""
    folder.mkdir()
    torch.manual_seed(seed)
    parts = []
    for rank in range(ranks):
        optimizer, units = cut(BOUNDS[ranks], rank)
        step(optimizer, 2)
        written = save_optimizer_state(folder / optimizer_file(rank), optimizer, units=units)
        assert written.sha256 == hash_file(folder / optimizer_file(rank))
        parts.append(moments(optimizer, units))
    return torch.stack(parts).nan_to_num(0).sum(0)


@pytest.mark.parametrize('ranks', [1, 2, 3])
@pytest.mark.parametrize('readers', [1, 2, 3])
def test_any_number_of_ranks_reads_what_any_number_wrote(ranks, readers, tmp_path):
    expected = save_all(tmp_path / 'saved', ranks)
    found = []
    for rank in range(readers):
        optimizer, units = cut(BOUNDS[readers], rank)
        load_optimizer_state(tmp_path / 'saved', optimizer, units=units)
        found.append(moments(optimizer, units).nan_to_num(0))
        for unit in units:
            if unit.fragments:
                state = optimizer.state[unit.tensor]
                assert (state['step'].dtype, state['step'].item()) == (torch.float32, 2)
                assert not state['exp_avg'][sum(f.numel for f in unit.fragments) :].any()  # padding
    assert torch.equal(torch.stack(found).sum(0), expected)
    assert expected.count_nonzero() == TOTAL


def test_whole_parameters_read_flat_pieces_and_back(tmp_path):
    expected = save_all(tmp_path / 'saved', 3)
    optimizer, units = whole()
    load_optimizer_state(tmp_path / 'saved', optimizer, units=units)
    assert torch.equal(moments(optimizer, units), expected)
    assert optimizer.state[units[0].tensor]['exp_avg'].shape == SHAPES['a']
    (tmp_path / 'again').mkdir()
    save_optimizer_state(tmp_path / 'again' / optimizer_file(0), optimizer, units=units)
    pieces, pieces_units = cut(BOUNDS[2], 1)
    load_optimizer_state(tmp_path / 'again', pieces, units=pieces_units)
    found = moments(pieces, pieces_units)
    assert torch.equal(found[~found.isnan()], expected[~found.isnan()])
    assert (~found.isnan()).sum() == 16


@pytest.mark.parametrize(
    ('make', 'settings'),
    [
        (AdamW, dict(weight_decay=0.1)),
        (AdamW, dict(fused=True)),
        (AdamW, dict(amsgrad=True)),
        (Adam, {}),
        (SGD, dict(momentum=0.9, nesterov=True)),
        (SGD, {}),
        (torch.optim.Adafactor, {}),
        (torch.optim.RMSprop, dict(momentum=0.5)),
    ],
)
def test_an_optimizer_goes_on_to_the_bit(make, settings, tmp_path):
    """The same gradients after a load as without one; schedulers have changed the rates meanwhile."""
    optimizer, units = whole(make, **settings)
    torch.manual_seed(5)
    step(optimizer, 2)
    optimizer.param_groups[0]['lr'] = 0.012345678901234567
    optimizer.param_groups[0]['initial_lr'] = 0.05
    save_optimizer_state(tmp_path / optimizer_file(0), optimizer, units=units)
    resumed, their_units = whole(make, **settings)
    load_optimizer_state(tmp_path, resumed, units=their_units)
    assert resumed.param_groups[0]['lr'] == 0.012345678901234567
    assert resumed.param_groups[0]['initial_lr'] == 0.05
    with torch.no_grad():
        for mine, theirs in zip(units, their_units, strict=True):
            theirs.tensor.copy_(mine.tensor)
    for one in (optimizer, resumed):
        torch.manual_seed(6)
        step(one, 2)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(units, their_units, strict=True))


def test_how_it_computes_is_this_runs_choice(tmp_path):
    """A checkpoint of a fused optimizer goes on in a plain one; rates and betas are the checkpoint's."""
    optimizer, units = whole(fused=True, betas=(0.8, 0.9))
    step(optimizer)
    save_optimizer_state(tmp_path / optimizer_file(0), optimizer, units=units)
    plain, their_units = whole(fused=False)
    load_optimizer_state(tmp_path, plain, units=their_units)
    assert [group['fused'] for group in plain.param_groups] == [False, False]
    assert [group['betas'] for group in plain.param_groups] == [(0.8, 0.9), (0.8, 0.9)]


def test_a_fresh_optimizer_has_a_file_too(tmp_path):
    optimizer, units = whole()
    save_optimizer_state(tmp_path / optimizer_file(0), optimizer, units=units)
    resumed, their_units = whole()
    load_optimizer_state(tmp_path, resumed, units=their_units)
    assert not resumed.state


# ---- refused


def refused(tmp_path, optimizer, units, message):
    before = {id(k): dict(v) for k, v in optimizer.state.items()}
    rates = [group['lr'] for group in optimizer.param_groups]
    with pytest.raises(CheckpointError, match=message):
        load_optimizer_state(tmp_path / 'saved', optimizer, units=units)
    assert {id(k): dict(v) for k, v in optimizer.state.items()} == before
    assert [group['lr'] for group in optimizer.param_groups] == rates


def test_another_optimizer(tmp_path):
    save_all(tmp_path / 'saved', 2)
    message = 'holds the state of AdamW over first, second; this run has SGD over first, second; .*--reset-optimizer'
    refused(tmp_path, *whole(SGD, lr=0.1), message)


def test_other_groups(tmp_path):
    save_all(tmp_path / 'saved', 2)
    optimizer, units = whole()
    optimizer.param_groups[1]['name'] = 'vision'
    refused(tmp_path, optimizer, units, 'this run has AdamW over first, vision')


def test_other_parameters(tmp_path):
    save_all(tmp_path / 'saved', 2)
    optimizer, units = whole()
    units[3] = Unit(units[3].tensor, (FragmentRecord('e', 0, 8, 0),))
    refused(tmp_path, optimizer, units, r'no optimizer state of 1 tensors that train here \(first: e\)')


def test_a_file_of_a_rank_is_missing(tmp_path):
    save_all(tmp_path / 'saved', 2)
    (tmp_path / 'saved' / optimizer_file(1)).unlink()
    optimizer, units = whole()
    refused(tmp_path, optimizer, units, r'no optimizer state of 1 tensors that train here \(first: b\)')
    refused(
        tmp_path, optimizer, units[:1], 'lacks the optimizer state of a from weight 11 to 15; a file of another rank'
    )


def test_no_state_at_all(tmp_path):
    (tmp_path / 'saved').mkdir()
    refused(tmp_path, *whole(), 'holds no state of an optimizer; use --reset-optimizer')


@pytest.mark.parametrize('content', [b'', b'no safetensors file at all', bytes(8), b'\x80\x02K\x01.'])
def test_a_foreign_file(content, tmp_path):
    save_all(tmp_path / 'saved', 2)
    (tmp_path / 'saved' / optimizer_file(1)).write_bytes(content)
    refused(tmp_path, *whole(), 'is not the state of an optimizer as vlmtune writes it')


def test_state_of_another_shape_fits_its_own_unit_only(tmp_path):
    """Adafactor keeps rows and columns."""
    (tmp_path / 'saved').mkdir()
    optimizer, units = whole(torch.optim.Adafactor)
    step(optimizer)
    save_optimizer_state(tmp_path / 'saved' / optimizer_file(0), optimizer, units=units)
    message = r'fits only the strategy and number of processes that saved it \(col_var, row_var cannot be cut'
    refused(tmp_path, *cut(BOUNDS[1], 0, torch.optim.Adafactor), message)


def test_units_that_were_stepped_differently_cannot_be_joined(tmp_path):
    (tmp_path / 'saved').mkdir()
    for rank in range(2):
        optimizer, units = cut(BOUNDS[2], rank)
        step(optimizer, 1 + rank)
        save_optimizer_state(tmp_path / 'saved' / optimizer_file(rank), optimizer, units=units)
    refused(tmp_path, *whole(), 'parts of it have states of different kinds')


def test_what_is_no_number_cannot_be_saved(tmp_path):
    optimizer, units = whole()
    step(optimizer)
    optimizer.state[units[0].tensor]['history'] = [1, 2]
    with pytest.raises(CheckpointError, match='keeps history of type list, which no checkpoint can hold'):
        save_optimizer_state(tmp_path / optimizer_file(0), optimizer, units=units)


def test_names_say_where_values_lie(tmp_path):
    """What docs/checkpoint_format.md promises to other readers."""
    save_all(tmp_path / 'saved', 2)
    with safe_open(tmp_path / 'saved' / optimizer_file(1), framework='pt') as file:
        names = [name for name in file.keys() if name.endswith('exp_avg')]  # noqa: SIM118
        assert {name: file.get_tensor(name).shape for name in names} == {
            'a@11/exp_avg': (4,), 'b@0/exp_avg': (7,), 'd@3/exp_avg': (5,),
        }  # fmt: skip
    with SavedState(tmp_path / 'saved') as saved:
        assert (saved.kind, [group['name'] for group in saved.groups]) == ('AdamW', ['first', 'second'])
