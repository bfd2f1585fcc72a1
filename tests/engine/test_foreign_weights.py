"""Weights under the names of others, mmengine, XTuner, DeepSpeed and the original authors, find their places."""

import json
import shutil

import pytest
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import load_file, save_file

from vlmtune.engine.foreign_weights import check_loadable, open_source
from vlmtune.layouts import open_weights
from vlmtune.layouts.internlm2 import INTERNLM2
from vlmtune.models import SupervisedFinetune, load_model
from vlmtune.utils.errors import CheckpointError, ModelError

LORA = dict(projector='full', llm='lora')
FULL = dict(vision_encoder='full', projector='full', llm='full')
STILL = dict(lr=0.0, max_epochs=None, max_steps=1, horizon=1, save_steps=1)


@pytest.fixture(scope='module')
def other(tiny_model):
    """``other(tune)``: a model of other weights everywhere, and of the recipe's LoRA."""
    made = {}

    def build(tune=LORA, model_type='llava', **lora):
        key = repr((tune, model_type, lora))
        if key not in made:
            base = str(tiny_model(model_type, seed=5))
            model = SupervisedFinetune(base, tune=tune, lora=dict(r=4, alpha=8) | lora, dtype='float32')
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in model.named_trainable().values():
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            made[key] = model
        return made[key]

    return build


def trained(model, *parts):
    found = {name: p.detach().clone() for name, p in model.named_trainable().items()}
    return {name: tensor for name, tensor in found.items() if not parts or model.part_of(name) in parts}


def assert_equal(found, expected):
    assert set(found) >= set(expected)
    assert expected
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ---- mmengine, XTuner, DeepSpeed


def xtuner_name(name):
    """LLaVA as XTuner calls it."""
    lora = 'base_model.model.' if '.lora_' in name else ''
    name = name.replace('.base_layer', '')
    for ours, theirs in (
        ('model.language_model.', f'llm.{lora}model.'),
        ('lm_head.', f'llm.{lora}lm_head.'),
        ('model.vision_tower.', 'visual_encoder.vision_model.'),
        ('model.multi_modal_projector.linear_1.', 'projector.model.0.'),
        ('model.multi_modal_projector.linear_2.', 'projector.model.2.'),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(name)


def save_xtuner(path, weights):
    buffer = HistoryBuffer([0.5], [1])
    meta = dict(config='import os; os._exit(3)', iter=1, seed=1)
    messages = dict(log_scalars={'train/loss': buffer}, runtime_info={}, resumed_keys={})
    path.parent.mkdir(parents=True, exist_ok=True)
    key = 'module' if path.suffix == '.pt' else 'state_dict'
    torch.save({key: {xtuner_name(k): v for k, v in weights.items()}, 'meta': meta, 'message_hub': messages}, path)


@pytest.mark.parametrize('name', ['iter_1.pth', 'iter_1.pth/mp_rank_00_model_states.pt'])
def test_xtuners_lora(name, start_from, other, tmp_path, caplog):
    weights = trained(other())
    save_xtuner(tmp_path / 'xtuner' / name, weights)
    caplog.set_level('INFO')
    assert_equal(start_from('a', tmp_path / 'xtuner' / 'iter_1.pth'), weights)
    assert 'it does not say the alpha' in caplog.text


def test_xtuners_full_model(start_from, other, tmp_path):
    model = other(FULL)
    save_xtuner(tmp_path / 'x.pth', dict(model.model.named_parameters()))
    assert_equal(start_from('a', tmp_path / 'x.pth', tune=FULL), trained(model))


def test_mmengines_own_names(start_from, other, tmp_path):
    weights = trained(other())
    torch.save(dict(state_dict={f'module.{k}': v for k, v in weights.items()}), tmp_path / 'x.pth')
    assert_equal(start_from('a', tmp_path / 'x.pth'), weights)


def test_names_without_a_place_are_listed(start_from, tmp_path):
    torch.save(dict(state_dict={f'qformer.{i}.weight': torch.ones(2) for i in range(5)}), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'5 of its tensors have no place .*qformer.0.weight.*, and 2 more'):
        start_from('a', tmp_path / 'x.pth')


INTERN_NAMES = (
    ('model.multi_modal_projector.layer_norm', 'model.mlp1.0'),
    ('model.multi_modal_projector.linear_1', 'model.mlp1.1'),
    ('model.multi_modal_projector.linear_2', 'model.mlp1.3'),
    ('model.vision_tower.encoder.layer.', 'model.vision_model.encoder.layers.'),
    ('model.vision_tower.embeddings.cls_token', 'model.vision_model.embeddings.class_embedding'),
    ('model.vision_tower.embeddings.position_embeddings', 'model.vision_model.embeddings.position_embedding'),
    ('model.vision_tower.embeddings.patch_embeddings.projection', 'model.vision_model.embeddings.patch_embedding'),
    ('.attention.projection_layer', '.attn.proj'),
    ('.lambda_', '.ls'),
    ('.layernorm_before', '.norm1'),
    ('.layernorm_after', '.norm2'),
    ('model.language_model.', 'model.language_model.model.'),
    ('embed_tokens', 'tok_embeddings'),
    ('self_attn.o_proj', 'attention.wo'),
    ('mlp.gate_proj', 'feed_forward.w1'),
    ('mlp.up_proj', 'feed_forward.w3'),
    ('mlp.down_proj', 'feed_forward.w2'),
    ('input_layernorm', 'attention_norm'),
    ('post_attention_layernorm', 'ffn_norm'),
)


def internvl2_on_internlm2(model):
    """The weights of a native InternVL as InternVL2's own files have them."""
    weights = {}
    for name, tensor in model.named_parameters():
        for ours, theirs in INTERN_NAMES:
            name = name.replace(ours, theirs)
        weights['model.language_model.output.weight' if name == 'lm_head.weight' else name] = tensor
    for name in [name for name in weights if '.q_proj.' in name]:
        q, k, v = (weights.pop(name.replace('q_proj', part)) for part in ('q_proj', 'k_proj', 'v_proj'))
        if 'vision_model' in name:
            weights[name.replace('attention.q_proj', 'attn.qkv')] = torch.cat([q, k, v])
        else:
            heads = [t.view(2, -1, 16, t.shape[1]) for t in (q, k, v)]  # 2 key heads of 16, each with 2 queries
            weights[name.replace('self_attn.q_proj', 'attention.wqkv')] = torch.cat(heads, 1).reshape(-1, q.shape[1])
    return weights


def test_internvl2_on_internlm2(tmp_path, other):
    """Queries, keys and values lie in one tensor there."""
    model = other(FULL, 'internvl_llama')
    ours = dict(model.model.named_parameters())
    theirs = internvl2_on_internlm2(model.model)
    assert not {*theirs} & {*ours} - {'model.language_model.model.norm.weight'}
    torch.save(dict(state_dict=theirs), tmp_path / 'x.pth')
    source = open_source(tmp_path / 'x.pth', model=model)
    assert source.lost == []
    assert set(source.weights) == set(ours)
    assert all(torch.equal(source.weights[name].read(), ours[name]) for name in ours)
    assert all(source.weights[name].shape == tuple(ours[name].shape) for name in ours)


# ---- original layouts


RANK = 8  # as many rows as can be cut like a fused weight, which A must not be


@pytest.fixture
def internlm2(other):
    return other(dict(llm='lora', embeddings='full', lm_head='full'), 'internlm2', r=RANK)


@pytest.mark.parametrize('shorn', ['', 'module.llm.'])
def test_an_original_checkpoint(shorn, tiny_model, tmp_path, other):
    """InternLM2 as it is published, and as XTuner saves it."""
    model = other(dict(llm='full', lm_head='full'), 'internlm2')
    path = tiny_model('internlm2', seed=7)
    expected, _ = load_model(str(path), dtype=torch.float32)
    if shorn:
        weights = {shorn + name: w.read() for name, w in open_weights(path).items()}
        path = tmp_path / 'x.pth'
        torch.save(dict(state_dict=weights), path)
    check_loadable(path)
    source = open_source(path, model=model)
    assert source.lost == []
    assert_equal({n: w.read() for n, w in source.weights.items()}, dict(expected.named_parameters()))


def test_an_original_checkpoint_that_lacks_a_file(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model('internlm2'), tmp_path / 'model')
    (copy / 'model.safetensors').rename(copy / 'model-00001-of-00002.safetensors')
    index = {'weight_map': {'output.weight': 'model-00002-of-00002.safetensors'}}
    (copy / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(ModelError, match='lacks model-00002-of-00002.safetensors, one of 1 files'):
        check_loadable(copy)


def fused_adapter(folder, weights, *, base, alpha=8):
    """LoRA on the official code: one update for queries, keys and values together."""
    folder.mkdir()
    names = {'lora_A': (RANK, 64), 'lora_B': (128, RANK)}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f'{base}model.layers.{i}.attention.wqkv.{side}.weight': torch.randn(shape, generator=generator)
        for i in range(2)
        for side, shape in names.items()
    }
    others = dict(
        o_proj='attention.wo', gate_proj='feed_forward.w1', up_proj='feed_forward.w3', down_proj='feed_forward.w2'
    )
    for name, tensor in weights.items():
        layer, _, leaf = name.partition('.default.')
        for ours, theirs in others.items():
            if f'.{ours}.' in name:
                tensors[
                    base + layer.replace(f'self_attn.{ours}', theirs).replace(f'mlp.{ours}', theirs) + f'.{leaf}'
                ] = tensor
    save_file(tensors, folder / 'adapter_model.safetensors', {'format': 'pt'})
    settings = dict(peft_type='LORA', r=RANK, lora_alpha=alpha, target_modules=['wqkv', 'wo', 'w1', 'w2', 'w3'])
    (folder / 'adapter_config.json').write_text(json.dumps(settings))
    return tensors


def test_an_adapter_that_was_trained_on_fused_projections(internlm2, tmp_path):
    """B is cut as the weight is, A serves all three: the same update of the same weight."""
    tensors = fused_adapter(tmp_path / 'a', trained(internlm2), base='base_model.model.')
    source = open_source(tmp_path / 'a', model=internlm2)
    assert source.lost == []
    lora = {name for name in internlm2.named_trainable() if '.lora_' in name}
    assert set(source.weights) == lora
    there = 'base_model.model.model.layers.1.attention.wqkv.lora_'
    update = tensors[f'{there}B.weight'] @ tensors[f'{there}A.weight']
    (rule,) = (rule for rule in INTERNLM2.rules(internlm2.model.config) if len(rule.native) > 1)
    for part, expected in zip('qkv', rule.split(update), strict=True):
        here = f'model.layers.1.self_attn.{part}_proj.lora_'
        found = source.weights[f'{here}B.default.weight'].read() @ source.weights[f'{here}A.default.weight'].read()
        torch.testing.assert_close(found, expected)


def test_a_fused_adapter_of_another_alpha(internlm2, tmp_path):
    fused_adapter(tmp_path / 'a', trained(internlm2), base='base_model.model.')
    config = tmp_path / 'a' / 'adapter_config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(alpha_pattern={'attention.wqkv': 32})))
    with pytest.raises(CheckpointError, match='rank 8 and alpha 32 at .*q_proj, this run rank 8 and alpha 8'):
        open_source(tmp_path / 'a', model=internlm2)


def test_weights_in_pieces_are_refused(tmp_path):
    torch.save({}, tmp_path / 'zero_pp_rank_0_mp_rank_00_model_states.pt')
    with pytest.raises(CheckpointError, match=r'in pieces \(DeepSpeed ZeRO-3\)'):
        check_loadable(tmp_path)


# ---- several ranks


@pytest.mark.parametrize('deepspeed', [None, 'zero2', pytest.param('zero3', marks=pytest.mark.slow)])
def test_two_ranks(deepspeed, other, tmp_path, tiny_model, write_recipe, train_in_ranks):
    """A legacy file through the strategy: LoRA, a part in full, and a frozen part that is equal."""
    weights, base = trained(other()), SupervisedFinetune(str(tiny_model('llava')), tune=LORA, dtype='float32')
    frozen = {n: p.detach() for n, p in base.model.named_parameters() if n.startswith('model.vision_tower')}
    save_xtuner(tmp_path / 'x.pth', {**weights, **frozen})
    overrides = dict(STILL, load_from=str(tmp_path / 'x.pth'))
    recipe = write_recipe(tmp_path / 'recipe.py')
    train_in_ranks(2, recipe, work_dir=tmp_path / 'a', overrides=overrides, deepspeed=deepspeed)
    assert_equal(load_file(tmp_path / 'a' / 'iter_1.pth' / 'model.safetensors'), weights)
