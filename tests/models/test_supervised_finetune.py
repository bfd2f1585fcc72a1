"""The loss is the model's own; every trainable weight gets a gradient; the table says what is trained."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from vlmtune.families import FAMILIES
from vlmtune.layouts import find_layout
from vlmtune.models import SupervisedFinetune, load_model
from vlmtune.structures import IGNORE_INDEX
from vlmtune.testing import list_tiny_models, list_tiny_originals
from vlmtune.utils.errors import CheckpointError, ConfigError, ModelError

TEXT = ['llama', 'qwen2', 'qwen3', 'mistral', 'gemma', 'gemma3_text', 'granite', 'olmo2', 'phi3', 'smollm3']
VISION = [
    name
    for name in [*list_tiny_models(), *list_tiny_originals()]
    if (name in FAMILIES and name not in TEXT) or name == 'internvl_llama'
]


def transformers_model(family):
    if find_layout(str(family.path)) is not None:  # transformers cannot read it, or has no such class
        return load_model(str(family.path), dtype=torch.float32)[0].eval()
    auto = AutoModelForImageTextToText if family.processor.family.has_vision else AutoModelForCausalLM
    return auto.from_pretrained(family.path, dtype=torch.float32).eval()


# ---- the loss


PACKED = [name for name in (*TEXT, *VISION) if name == 'internvl_llama' or FAMILIES[name].packing]


@pytest.mark.parametrize(
    ('name', 'pack'), [*((name, True) for name in PACKED), *((name, False) for name in (*TEXT, *VISION))]
)
def test_the_loss_is_the_models_own(name, pack, case):
    """1e-6 of a loss of about 6: both are float32 means over the same logits, summed in another order.

    Where transformers' own mask of a packed row leaks, it gets the samples one by one.
    """
    family = case(name, amplify=1.0)
    batch = family.batch(pack=pack)
    leaks = pack and family.processor.family.masks is not None
    batches = [family.batch(i) for i in range(4)] if leaks else [batch]
    counts = [(one['labels'][:, 1:] != IGNORE_INDEX).sum() for one in batches]
    with torch.no_grad():
        mine = family.build().eval()(**batch) / sum(counts)
        model = transformers_model(family)
        losses = [model(**one, use_cache=False).loss * n for one, n in zip(batches, counts, strict=True)]
    theirs = sum(losses) / sum(counts)
    assert mine.dtype == torch.float32
    assert abs(mine - theirs) < 1e-6 * theirs


def test_the_first_label_of_a_row_and_what_is_ignored_do_not_count(case):
    family = case('llama')
    model, batch = family.build().eval(), family.batch(0)
    with torch.no_grad():
        before = model(**batch)
        batch['labels'][0, 0] = 3
        assert model(**batch) == before
        batch['labels'][0, -1] = IGNORE_INDEX
        assert model(**batch) < before
        assert model(**{**batch, 'labels': torch.full_like(batch['labels'], IGNORE_INDEX)}) == 0


@pytest.mark.parametrize('name', ['llama', 'llava', 'qwen2_5_vl', 'qwen3_vl', 'internvl', 'smolvlm'])
def test_bfloat16_stays_near_float32(name, case):
    """Measured: up to 0.3 %; bfloat16 has 8 bits of mantissa. Everything trains, so weights are float32."""
    family = case(name, amplify=1.0)
    exact = family.build()(**family.batch())
    model = family.build(dtype='bfloat16')
    assert {p.dtype for p in model.named_trainable().values()} == {torch.float32}
    loss = model(**family.batch())
    assert loss.dtype == torch.float32
    assert 0 < abs(loss - exact) / exact < 0.01
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.named_trainable().values())


def test_frozen_weights_keep_the_dtype_but_for_layer_norms(case):
    model = case('llava').build(dtype='bfloat16', tune=dict(llm='lora'))
    kinds = {(part.rsplit('.', 2)[-2], p.dtype) for part, p in model.model.named_parameters()}
    norms = {'layer_norm1', 'layer_norm2', 'post_layernorm', 'pre_layrnorm'}
    assert norms == {name for name, dtype in kinds if dtype == torch.float32} - {'default'}
    assert ('q_proj', torch.bfloat16) in kinds or ('base_layer', torch.bfloat16) in kinds


@pytest.mark.parametrize('name', ['llama', 'llava', 'qwen3_vl', 'internvl', 'idefics3'])
def test_gradient_checkpointing_changes_nothing(name, case):
    family = case(name, amplify=1.0)
    grads = []
    for checkpointing in (False, True):
        model = family.build(gradient_checkpointing=checkpointing).train()
        assert model.model.is_gradient_checkpointing == checkpointing
        model(**family.batch()).backward()
        grads.append({key: p.grad for key, p in model.named_trainable().items()})
    assert all(torch.equal(grad, grads[1][key]) for key, grad in grads[0].items())


# ---- the table


def test_the_report_counts_every_weight_once(case):
    model = case('llava').build(tune=dict(projector='full', llm=dict(mode='lora', lr=1e-3)), lora=dict(r=4))
    rows = {row.part: row for row in model.report()}
    assert list(rows) == ['vision_encoder', 'projector', 'llm', 'embeddings', 'lm_head']
    assert {part: row.mode for part, row in rows.items()} == {
        'vision_encoder': 'frozen',
        'projector': 'full',
        'llm': 'lora',
        'embeddings': 'frozen',
        'lm_head': 'frozen',
    }
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in model.model.parameters())
    # r (in + out): q and o 64 + 64, k and v 64 + 32, gate, up and down 64 + 128; two layers
    assert rows['llm'].trainable == 2 * 4 * (2 * 128 + 2 * 96 + 3 * 192)
    assert rows['projector'].trainable == rows['projector'].parameters == (32 * 64 + 64) + (64 * 64 + 64)
    assert rows['embeddings'].parameters == rows['lm_head'].parameters == 64 * model.model.config.text_config.vocab_size
    assert [row.trainable for part, row in rows.items() if row.mode == 'frozen'] == [0, 0, 0]
    assert {part: row.lr for part, row in rows.items() if row.lr} == {'llm': 1e-3}


def test_the_report_of_a_tied_model_counts_the_head_as_embeddings(case):
    model = case('qwen2', tie_word_embeddings=True).build()
    rows = {row.part: row for row in model.report()}
    assert rows['lm_head'].parameters == 0
    assert rows['embeddings'].trainable == rows['embeddings'].parameters > 0
    assert rows['lm_head'].mode == 'full'


# ---- tied and growing embeddings


def test_tied_embeddings_train_as_one(case):
    family = case('qwen2', tie_word_embeddings=True)
    model = family.build(tune=dict(embeddings='full'))
    assert list(model.named_trainable()) == ['model.embed_tokens.weight']
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
    model(**family.batch()).backward()
    tied = model.model.lm_head.weight.grad
    untied = case('qwen2').build(tune=dict(embeddings='full'))
    assert (tied != 0).any(1).sum() == len(tied)  # as a head, every row of the vocabulary gets a gradient
    assert [row.trainable for row in untied.report() if row.part == 'lm_head'] == [0]


@pytest.mark.parametrize('tie', [False, True])
def test_embeddings_grow_for_new_tokens(tie, case):
    family = case('qwen2', tie_word_embeddings=tie)
    before = transformers_model(family)
    rows = before.get_input_embeddings().weight.shape[0]
    model = family.build(tune=dict(llm='lora', embeddings='full', lm_head='full'), vocab_size=rows + 5)
    for old, new in (
        (before.get_input_embeddings(), model.model.get_input_embeddings()),
        (before.get_output_embeddings(), model.model.get_output_embeddings()),
    ):
        assert new.weight.shape[0] == rows + 5
        assert new.weight.requires_grad
        assert torch.equal(new.weight[:rows], old.weight)
    assert (model.model.get_input_embeddings().weight is model.model.get_output_embeddings().weight) == tie
    batch = family.batch()
    batch['input_ids'][0, 3] = rows + 4
    model(**batch).backward()
    assert model.model.get_input_embeddings().weight.grad[rows + 4].abs().max() > 0


def test_embeddings_with_spare_rows_do_not_grow(case):
    family = case('qwen2')
    rows = transformers_model(family).get_input_embeddings().weight.shape[0]
    model = family.build(tune=dict(embeddings='full', lm_head='full'), vocab_size=rows - 2)
    assert model.model.get_input_embeddings().weight.shape[0] == rows


@pytest.mark.parametrize('more', [-2, 5], ids=['spare rows', 'too few rows'])
def test_new_tokens_need_embeddings_that_train(more, case):
    """Spare rows are noise: frozen, they would stay noise."""
    family = case('qwen2')
    rows = transformers_model(family).get_input_embeddings().weight.shape[0]
    with pytest.raises(ConfigError, match='new tokens need embeddings that train; set tune embeddings="full"'):
        family.build(tune=dict(llm='lora'), vocab_size=rows + more)


# ---- loading what was trained


def test_load_trainable_round_trip(case):
    family = case('llava')
    settings = dict(tune=dict(projector='full', llm='lora'), lora=dict(r=4))
    trained, fresh = family.build(**settings), family.build(**settings)
    with torch.no_grad():
        for parameter in trained.named_trainable().values():
            parameter.add_(0.1)
    state = {name: p.detach().clone() for name, p in trained.named_trainable().items()}
    batch = family.batch()
    assert fresh.eval()(**batch) != trained.eval()(**batch)
    fresh.load_trainable(state)
    assert fresh(**batch) == trained(**batch)


def test_load_trainable_refuses_what_does_not_fit(case):
    model = case('llava').build(tune=dict(projector='full'))
    state = {name: p.detach().clone() for name, p in model.named_trainable().items()}
    first = min(state)
    with pytest.raises(
        CheckpointError, match=r"1 tensors are missing \(first: \['model.multi_modal_projector.linear_1.b"
    ):
        model.load_trainable({name: t for name, t in state.items() if name != first})
    with pytest.raises(
        CheckpointError, match=r'1 are not trained here \(first: .*lm_head.*use the config that made it'
    ):
        model.load_trainable({**state, 'lm_head.weight': torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r'linear_1.bias is \(3,\) in the checkpoint, \(64,\) here'):
        model.load_trainable({**state, first: torch.zeros(3)})
    assert all(torch.equal(p, state[name]) for name, p in model.named_trainable().items())


# ---- mistakes


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(dtype='float64'), "dtype='float64' is not supported; expected one of float32, bfloat16, float16"),
        (dict(quantization='fp4'), "quantization='fp4' is unknown; expected None, 'nf4', 'int8'"),
        (dict(quantization='nf4', tune=dict(llm='full')), "quantization='nf4' needs a frozen llm; set tune llm='lora'"),
        (dict(tune={}), 'tune: every part is frozen'),
    ],
)
def test_settings_that_contradict_each_other(settings, message, case):
    with pytest.raises(ConfigError, match=message):
        case('llama').build(**settings)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match=r'no model at .*nowhere; expected a folder with config.json, or a hub id'):
        SupervisedFinetune(str(tmp_path / 'nowhere'), tune=dict(llm='full'))


def test_a_family_that_is_not_supported(tmp_path):
    (tmp_path / 'config.json').write_text('{"model_type": "mistral3"}')
    with pytest.raises(
        ModelError, match=r"model type 'mistral3' is not supported, did you mean 'mistral'\?; supported are"
    ):
        SupervisedFinetune(str(tmp_path), tune=dict(llm='full'))


def test_an_attention_that_is_not_installed(case):
    for name, reason in (
        ('flash_attention_2', 'needs a GPU and the package flash-attn'),
        ('flash_attention_3', 'needs a Hopper GPU and the package flash-attn-3'),
        ('flex_attention', 'has no backward pass on the CPU'),
        ('varlen', 'runs on GPUs only'),
    ):
        with pytest.raises(ConfigError, match=f"attn_implementation='{name}' {reason}; set attn_implementation='sdpa'"):
            case('llama').build(attn_implementation=name)
    with pytest.raises(ConfigError, match="attn_implementation='spda' is unknown, did you mean 'sdpa'"):
        case('llama').build(attn_implementation='spda')
