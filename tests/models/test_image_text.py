"""A made-up family on the base classes for models of our own."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from vlmtune.models.image_text import ImageTextForGeneration, ImageTextModel
from vlmtune.utils.errors import ModelError

IMAGE = 7


class DotsConfig(PreTrainedConfig):
    model_type = 'dots'
    sub_configs = {'text_config': AutoConfig}  # noqa: RUF012

    def __init__(self, text_config=None, image_token_id=IMAGE, **kwargs):
        self.text_config = (
            text_config if isinstance(text_config, PreTrainedConfig) else LlamaConfig(**(text_config or {}))
        )
        self.image_token_id = image_token_id
        super().__init__(**kwargs)


class DotsModel(ImageTextModel):
    config_class = DotsConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = nn.Linear(3, 4)
        self.multi_modal_projector = nn.Linear(4, config.text_config.hidden_size)
        self.post_init()

    def get_image_features(self, pixel_values):
        return self.multi_modal_projector(self.vision_tower(pixel_values))


class Dots(ImageTextForGeneration):
    config_class = DotsConfig
    model_class = DotsModel


def build(*, tied=False, **text):
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.4, **text,
    )  # fmt: skip
    return Dots(DotsConfig(text, tie_word_embeddings=tied)).eval()


IDS = torch.tensor([[1, IMAGE, IMAGE, 5, 6]])
DOTS = torch.tensor([[0.5, 1.0, -1.0], [2.0, 0.0, 1.0]])


@torch.no_grad()
def test_features_stand_in_the_places_of_image_tokens_in_their_order():
    model = build()
    embedded = model.get_input_embeddings()(IDS)
    embedded[0, 1:3] = model.model.get_image_features(DOTS)
    assert torch.equal(model(IDS, pixel_values=DOTS).logits, model(inputs_embeds=embedded).logits)
    assert not torch.equal(model(IDS, pixel_values=DOTS.flip(0)).logits, model(IDS, pixel_values=DOTS).logits)


@pytest.mark.parametrize('ids', [[[1, IMAGE, 5, 6]], [[IMAGE, IMAGE, IMAGE]], [[1, 2]]])
def test_a_wrong_number_of_image_tokens_is_refused(ids):
    with pytest.raises(ModelError, match=r'image tokens \(id 7\) in the input, but the images make 2 features'):
        build()(torch.tensor(ids), pixel_values=DOTS)


@torch.no_grad()
def test_an_answer_sees_the_images_of_the_prompt_once(monkeypatch):
    model, calls = build(), []
    features = model.model.get_image_features
    monkeypatch.setattr(model.model, 'get_image_features', lambda **images: calls.append(1) or features(**images))
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    cached = model.generate(IDS, pixel_values=DOTS, **settings)
    assert len(calls) == 1
    assert torch.equal(cached, model.generate(IDS, pixel_values=DOTS, use_cache=False, **settings))
    assert len(calls) == 5
    assert not torch.equal(cached, model.generate(IDS, pixel_values=-DOTS, **settings))


@torch.no_grad()
def test_the_loss_is_that_of_the_logits():
    model = build()
    labels = IDS.clone()
    labels[:, :3] = -100
    output = model(IDS, pixel_values=DOTS, labels=labels)
    expected = nn.functional.cross_entropy(output.logits[0, 2:4], IDS[0, 3:5])
    assert float(output.loss) == pytest.approx(float(expected), abs=1e-6)  # rounding of one float32 mean


@torch.no_grad()
def test_only_wanted_logits_are_made():
    model = build()
    few, every = (model(IDS, pixel_values=DOTS, logits_to_keep=n).logits for n in (2, 0))
    assert few.shape == (1, 2, 32)
    assert torch.allclose(few, every[:, -2:], rtol=0, atol=1e-5)  # another shape, other kernels


@pytest.mark.parametrize('tied', [False, True])
def test_what_is_saved_is_loaded(tied, tmp_path):
    model = build(tied=tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    again, info = Dots.from_pretrained(tmp_path, output_loading_info=True)
    assert not info['missing_keys']
    assert not info['unexpected_keys']
    assert torch.equal(again(IDS, pixel_values=DOTS).logits, model(IDS, pixel_values=DOTS).logits)
    assert isinstance(again.config.text_config, LlamaConfig)
