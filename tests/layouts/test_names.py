import pytest
import torch

from vlmtune.layouts import NameMap, Rule, rename

RULES = (
    rename('llm.layers.{i}.wo.{leaf}', 'model.layers.{i}.o_proj.{leaf}'),
    Rule(
        'llm.layers.{i}.wkv.weight',
        ('model.layers.{i}.k.weight', 'model.layers.{i}.v.weight'),
        lambda tensor: tensor.chunk(2),
        torch.cat,
    ),
)


def test_a_name_and_its_holes_are_carried_over():
    match = NameMap(RULES).match('llm.layers.12.wo.weight')
    assert match.native == ('model.layers.12.o_proj.weight',)
    tensor = torch.ones(2)
    assert match.rule.split(tensor) == (tensor,)
    assert match.rule.join([tensor]) is tensor


def test_a_fused_tensor_comes_apart_and_together():
    match = NameMap(RULES).match('llm.layers.3.wkv.weight')
    assert match.native == ('model.layers.3.k.weight', 'model.layers.3.v.weight')
    tensor = torch.arange(8.0).view(4, 2)
    key, value = match.rule.split(tensor)
    assert torch.equal(key, tensor[:2])
    assert torch.equal(value, tensor[2:])
    assert torch.equal(match.rule.join([key, value]), tensor)


@pytest.mark.parametrize(
    'name',
    [
        'llm.layers.x.wo.weight',  # one letter stands for a number
        'llm.layers.1.wo.',  # a word stands for something
        'llm_layers.1.wo.weight',  # a dot is a dot
        'model.llm.layers.1.wo.weight',  # from the first character
        'llm.layers.1.wkv.weight_scale',  # to the last
    ],
)
def test_names_that_no_rule_knows(name):
    assert NameMap(RULES).match(name) is None


def test_the_first_rule_that_fits_wins():
    names = NameMap((rename('a.b.{rest}', 'first.{rest}'), rename('a.{rest}', 'second.{rest}')))
    assert names.match('a.b.c').native == ('first.c',)
    assert names.match('a.c.b').native == ('second.c.b',)


def test_a_hole_that_stands_twice_is_the_same_twice():
    names = NameMap((rename('blocks.{i}.part.{i}', 'parts.{i}'),))
    assert names.match('blocks.4.part.4').native == ('parts.4',)
    assert names.match('blocks.4.part.5') is None


def test_what_is_kept():
    names = NameMap((), kept=('rotary.{i}.inv_freq',))
    assert names.is_kept('rotary.10.inv_freq')
    assert not names.is_kept('rotary.inv_freq')
