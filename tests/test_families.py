"""The table is complete: every parameter of every model belongs to one part, and every path leads somewhere."""

import importlib
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from vlmtune.families import FAMILIES, PARTS, find_family
from vlmtune.models import load_model
from vlmtune.models.tuning import part_of
from vlmtune.testing import list_tiny_models
from vlmtune.utils.errors import ModelError

QWEN = ['qwen2_vl', 'qwen2_5_vl', 'qwen3_vl', 'qwen3_vl_moe', 'qwen3_5']
LLAVA = ['llava', 'llava_next', 'llava_onevision']
VISION = [*QWEN, *LLAVA, 'internvl', 'smolvlm', 'idefics3', 'gemma3', 'paligemma', 'points', 'minicpmv2']


def model_of(name, tiny_model):
    """The model on the meta device: of the tiny config where there is one, else of a small default one."""
    if FAMILIES[name].model is not None:
        return load_model(str(tiny_model(name)), device='meta')[0]
    if name in list_tiny_models():
        config = AutoConfig.from_pretrained(tiny_model(name))
    else:
        config = AutoConfig.for_model(name, num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    auto = AutoModelForImageTextToText if FAMILIES[name].has_vision else AutoModelForCausalLM
    with torch.device('meta'):
        return auto.from_config(config)


def test_the_table_names_its_rows():
    assert len(FAMILIES) == 29
    assert {name for name, family in FAMILIES.items() if family.has_vision} == set(VISION)
    assert all(name == family.model_type for name, family in FAMILIES.items())


@pytest.mark.parametrize('name', FAMILIES)
def test_every_parameter_belongs_to_a_part_and_no_part_is_empty(name, tiny_model):
    family, model = FAMILIES[name], model_of(name, tiny_model)
    counts = dict.fromkeys(PARTS, 0)
    for parameter, _ in model.named_parameters(remove_duplicate=False):
        counts[part_of(parameter, family=family)] += 1
    assert all((count > 0) == bool(family.part_paths(part)) for part, count in counts.items()), counts
    assert counts['embeddings'] == counts['lm_head'] == 1
    for part in PARTS:
        for path in family.part_paths(part):
            owner, _, last = path.rpartition('.')
            assert hasattr(model.get_submodule(owner), last), path  # a module or a parameter


@pytest.mark.parametrize('name', FAMILIES)
def test_head_and_embeddings_are_where_transformers_has_them(name, tiny_model):
    family, model = FAMILIES[name], model_of(name, tiny_model)
    assert model.get_submodule(family.lm_head[0]) is model.get_output_embeddings()
    assert model.get_submodule(family.embeddings[0]) is model.get_input_embeddings()


@pytest.mark.parametrize('name', VISION)
def test_the_merger_inside_the_tower_is_the_projector(name, tiny_model):
    """What touches the width of the language model is no part of the vision encoder."""
    family = FAMILIES[name]
    model = model_of(name, tiny_model)
    shapes = {
        part: {size for parameter, p in model.named_parameters() for size in p.shape
               if part_of(parameter, family=family) == part and p.ndim == 2}
        for part in ('vision_encoder', 'projector')
    }  # fmt: skip
    assert model.config.get_text_config().hidden_size in shapes['projector']


@pytest.mark.parametrize('name', VISION)
def test_placeholder_functions_exist(name):
    module, _, function = FAMILIES[name].placeholder.rpartition('.')
    assert callable(getattr(importlib.import_module(module), function))


def test_a_family_that_packs_needs_no_reason_and_one_that_does_not_needs_one():
    assert all(family.packing != bool(family.no_packing_reason) for family in FAMILIES.values())


def test_find_family():
    assert find_family('qwen2_5_vl') is FAMILIES['qwen2_5_vl']
    with pytest.raises(
        ModelError, match=r"'qwen25_vl' is not supported, did you mean 'qwen2_5_vl'\?; supported are gemma"
    ):
        find_family('qwen25_vl')
    with pytest.raises(ModelError, match="'zzz' is not supported; supported are"):
        find_family('zzz')


def test_a_parameter_of_no_part():
    with pytest.raises(
        ModelError, match=r'model\.vision_towers\.x belongs to no part of llava; its row in .* is incomplete'
    ):
        part_of('model.vision_towers.x', family=FAMILIES['llava'])


def test_the_table_imports_neither_torch_nor_transformers():
    code = "import sys, vlmtune.families; print(sorted({'torch', 'transformers', 'mmengine'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, '-c', code], text=True, timeout=600).strip() == '[]'
