"""Words become plans; what cannot be followed is an error that says so."""

import pytest

from vlmtune.families import FAMILIES
from vlmtune.models.tuning import LoraSettings, lora_settings, part_of, plan_parts, tunable_modules
from vlmtune.utils.errors import ConfigError

LLAVA, LLAMA, QWEN = FAMILIES['llava'], FAMILIES['llama'], FAMILIES['qwen3_vl']


def modes(tune, **kwargs):
    return {part: plan.mode for part, plan in plan_parts(tune, **{'family': LLAVA, **kwargs}).items()}


def test_parts_that_are_not_named_are_frozen():
    assert modes(dict(projector='full')) == {
        'vision_encoder': 'frozen',
        'projector': 'full',
        'llm': 'frozen',
        'embeddings': 'frozen',
        'lm_head': 'frozen',
    }


def test_embeddings_and_head_follow_an_llm_in_full_only():
    assert modes(dict(llm='full'))['embeddings'] == modes(dict(llm='full'))['lm_head'] == 'full'
    assert modes(dict(llm='lora'))['embeddings'] == 'frozen'
    assert modes(dict(llm='full', embeddings='frozen', lm_head='frozen'))['lm_head'] == 'frozen'


def test_a_tied_head_follows_the_embeddings():
    plans = plan_parts(dict(llm='lora', embeddings=dict(mode='full', lr=1e-3)), family=LLAMA, tied=True)
    assert (plans['lm_head'].mode, plans['lm_head'].lr) == ('full', 1e-3)
    with pytest.raises(
        ConfigError, match='embeddings and lm_head are one tensor in this model; give both the same mode'
    ):
        plan_parts(dict(llm='full', lm_head='frozen'), family=LLAMA, tied=True)


def test_a_text_model_has_no_vision_parts():
    assert list(modes(dict(llm='full', vision_encoder='frozen'), family=LLAMA)) == ['llm', 'embeddings', 'lm_head']
    with pytest.raises(ConfigError, match=r"tune.projector='full', but llama has no projector; remove it"):
        modes(dict(llm='full', projector='full'), family=LLAMA)


def test_a_part_brings_its_own_settings_and_inherits_the_rest():
    tune = dict(llm=dict(mode='lora', lr=1e-4, r=32, target_modules=['q_proj']), projector=dict(mode='full', lr=2e-3))
    plans = plan_parts(tune, family=LLAVA, lora=dict(r=8, alpha=64, dropout=0.1))
    assert plans['llm'].lora == LoraSettings(r=32, alpha=64, dropout=0.1, target_modules=('q_proj',))
    assert (plans['llm'].lr, plans['projector'].lr, plans['vision_encoder'].lr) == (1e-4, 2e-3, None)


def test_one_target_module_may_be_a_word():
    assert lora_settings(dict(target_modules='q_proj')).target_modules == ('q_proj',)


@pytest.mark.parametrize(
    ('tune', 'lora', 'message'),
    [
        (dict(vision_tower='full'), None, "tune: unknown 'vision_tower', did you mean 'vision_encoder'"),
        (dict(llm='Lora'), None, "tune.llm: 'Lora' is not one of frozen, lora, full"),
        (dict(llm=True), None, 'tune.llm: True is not one of frozen, lora, full'),
        (dict(llm=dict(r=8)), None, 'tune.llm: None is not one of frozen, lora, full'),
        (dict(llm=dict(mode='full', r=8)), None, 'tune.llm: r only apply to mode lora, not to full'),
        (dict(llm=dict(mode='lora', rank=8)), None, "lora: unknown 'rank'"),
        (dict(llm='lora'), dict(lora_alpha=8), "lora: unknown 'lora_alpha', did you mean 'alpha'"),
        (dict(embeddings='lora'), None, "embeddings and lm_head are 'frozen' or 'full'"),
        (dict(lm_head='lora'), None, "embeddings and lm_head are 'frozen' or 'full'"),
        (dict(), None, 'tune: every part is frozen .*, so there is nothing to train'),
        (dict(llm='frozen', projector='frozen'), None, 'nothing to train'),
    ],
)
def test_mistakes(tune, lora, message):
    with pytest.raises(ConfigError, match=message):
        plan_parts(tune, family=LLAVA, lora=lora)


@pytest.mark.parametrize(
    ('name', 'part'),
    [
        ('model.visual.blocks.0.attn.qkv.weight', 'vision_encoder'),
        ('model.visual.merger.norm.weight', 'projector'),
        ('model.visual.deepstack_merger_list.0.norm.weight', 'projector'),
        ('model.visual.merger_of_something_else.weight', 'vision_encoder'),
        ('model.language_model.embed_tokens.weight', 'embeddings'),
        ('model.language_model.layers.0.mlp.up_proj.lora_A.default.weight', 'llm'),
        ('lm_head.weight', 'lm_head'),
    ],
)
def test_the_longest_path_wins(name, part):
    assert part_of(name, family=QWEN) == part


def test_the_modules_of_the_parts_do_not_overlap(case):
    family = case('qwen3_vl')
    model = family.build().model
    found = [name for part in LLAVA.__dataclass_fields__ if part in ('vision_encoder', 'projector', 'llm')
             for name, _ in tunable_modules(model, part, family=QWEN)]  # fmt: skip
    assert len(found) == len(set(found)) > 50
