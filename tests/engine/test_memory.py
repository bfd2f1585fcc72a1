"""Memory estimates: exact where sizes say it all, monotone elsewhere."""

import pytest
import torch
from torch.optim import SGD, AdamW

from vlmtune.engine.memory import Load, MemoryModel, Sharding, state_bytes_per_weight
from vlmtune.models import SupervisedFinetune

LOAD = Load(tokens=1024, patches=512, supervised=256)


@pytest.fixture
def memory(tiny_model):
    def make(tune, *, name='llava', state_bytes=8.0, sharding=None, dtype='float32', **kwargs):
        model = SupervisedFinetune(str(tiny_model(name)), tune=tune, dtype=dtype, **kwargs)
        return MemoryModel(model, state_bytes=state_bytes, sharding=sharding)

    return make


@pytest.mark.parametrize(
    ('settings', 'size'),
    [(dict(type=AdamW, lr=1e-3), 8), (dict(type=SGD, lr=1e-3), 0), (dict(type=SGD, lr=1e-3, momentum=0.9), 4)],
)
def test_what_an_optimizer_keeps(settings, size):
    assert state_bytes_per_weight(settings) == pytest.approx(size, abs=1e-3)


def test_what_an_8_bit_optimizer_keeps():
    bitsandbytes = pytest.importorskip('bitsandbytes')
    size = state_bytes_per_weight(dict(type=bitsandbytes.optim.AdamW8bit, lr=1e-3))
    assert size == pytest.approx(2, abs=0.1)  # and a scale per block


@pytest.mark.parametrize(('name', 'tune'), [('llava', dict(projector='full', llm='lora')), ('qwen2', dict(llm='full'))])
def test_weights_as_they_are(name, tune, memory):
    """bfloat16 adds the copies of trained weights that autocast makes."""
    for dtype, copies in (('float32', 0), ('bfloat16', 2)):
        made = memory(tune, name=name, dtype=dtype)
        parameters = list(made.model.model.parameters())  # a tied head comes once
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        estimate = made.estimate(LOAD)
        assert estimate.weights == sum(p.nbytes for p in parameters) + copies * trained
        assert estimate.gradients == 4 * trained
        assert estimate.optimizer == 8 * trained


def test_quantised_weights(memory):
    """The language model's linear layers."""
    settings = dict(tune=dict(llm='lora'), dtype='bfloat16')
    plain, asked = memory(**settings), memory(**settings, quantization='nf4')
    saved = plain.quantizable * (2 - 0.52)
    assert plain.quantizable == 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)
    assert plain.estimate(LOAD).weights - plain.estimate(LOAD, quantization='nf4').weights == pytest.approx(saved)
    assert asked.estimate(LOAD).weights == plain.estimate(LOAD, quantization='nf4').weights


def test_stages_of_zero(memory):
    def estimate(stage, **offload):
        config = dict(zero_optimization=dict(stage=stage, **{k: v and dict(device=v) for k, v in offload.items()}))
        sharding = Sharding.from_deepspeed(config, ranks=4)
        return memory(dict(llm='full'), name='qwen2', sharding=sharding, dtype='bfloat16').estimate(LOAD)

    one, two, three = estimate(1), estimate(2), estimate(3)
    trained = one.gradients / 2
    assert one.optimizer == two.optimizer == trained * (8 + 4) / 4
    assert two.gradients == three.gradients == one.gradients / 4
    assert three.weights == two.weights / 4
    assert estimate(2, offload_optimizer='cpu').optimizer == 0
    assert estimate(3, offload_param='cpu').weights == 0
    assert estimate(2, offload_optimizer='none').optimizer == two.optimizer
    assert estimate(2, offload_optimizer=None).optimizer == two.optimizer  # "offload_optimizer": null


def test_activations(memory):
    made = memory(dict(vision_encoder='full', projector='full', llm='full'))
    base = made.estimate(LOAD).activations
    assert made.estimate(LOAD._replace(tokens=2048)).activations > base
    assert made.estimate(LOAD._replace(patches=1024)).activations > base
    assert made.estimate(LOAD, checkpointing=True).activations < base
    assert memory(dict(llm='lora')).estimate(LOAD).activations < base  # no gradient flows through vision
    asked = memory(dict(vision_encoder='full', projector='full', llm='full'), gradient_checkpointing=True)
    assert asked.estimate(LOAD).activations == made.estimate(LOAD, checkpointing=True).activations


@pytest.mark.parametrize(('dtype', 'size', 'copy'), [('float32', 4, 0), ('bfloat16', 2, 2)])
def test_the_loss_takes_one_chunk_of_logits(dtype, size, copy, memory):
    """64 MiB of float32 logits however large the vocabulary is, and their copy in another dtype."""
    made = memory(dict(llm='lora'), dtype=dtype)
    hidden = 64 * 2 * size
    for made.vocabulary, rows in ((32_000, 524), (151_936, 110)):
        few, more, most = (made.estimate(LOAD._replace(supervised=n)).loss for n in (100, 600, 1200))
        assert few == 100 * (made.vocabulary * (4 + copy) + hidden), 'less than a chunk'
        assert more == rows * made.vocabulary * (4 + copy) + 600 * hidden
        assert most - more == 600 * hidden


def test_a_model_without_weights_is_estimated_alike(tiny_model, memory):
    tune = dict(projector='full', llm='lora')
    empty = SupervisedFinetune(str(tiny_model('llava')), tune=tune, dtype='float32', device='meta')
    assert all(p.is_meta for p in empty.model.parameters())
    assert MemoryModel(empty, state_bytes=8.0).estimate(LOAD) == memory(tune).estimate(LOAD)
    assert torch.device('meta') == next(empty.parameters()).device
