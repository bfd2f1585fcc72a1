"""What a processor is told about images and tokens reaches its samples; what it cannot do is said in one line."""

import pytest

from vlmtune.structures import ImageSize
from vlmtune.utils.errors import ConfigError, DataError, ModelError

SIZES = [ImageSize(60, 90), ImageSize(100, 40), ImageSize(31, 28)]


# ---- mistakes and settings


def test_images_and_sizes_that_do_not_fit(make, talk, image_mark):
    shown = talk(('user', image_mark, 'What?'), ('assistant', 'x'))
    with pytest.raises(DataError, match='the chat template shows 1 images but the conversation has 0'):
        make('llava').tokenize(shown, image_sizes=[])
    with pytest.raises(DataError, match=r'has 1 images, but .* is a text model'):
        make('llama').tokenize(shown, image_sizes=SIZES[:1])
    with pytest.raises(DataError, match='the chat template shows 0 images but the conversation has 1'):
        make('qwen2_vl', prompt_template='chatml').tokenize(shown, image_sizes=SIZES[:1])  # its mark is <image>


def test_settings_of_the_image_processor(make, tiny_model):
    with pytest.raises(
        ConfigError, match=r"image_processor: unknown settings \['max_pixel'\]; Qwen2VLImageProcessorPil knows"
    ):
        make('qwen2_vl', image_processor={'max_pixel': 3})
    with pytest.raises(ConfigError, match=r"is a text model, but image_processor={'max_pixels': 3} was set; remove it"):
        make('llama', image_processor={'max_pixels': 3})


def test_a_size_that_qwens_stored_limits_would_overrule(make):
    with pytest.raises(ConfigError, match='has no effect, the checkpoint stores min_pixels and max_pixels; set those'):
        make('qwen2_vl', image_processor={'size': {'longest_edge': 5000, 'shortest_edge': 4000}})
    limits = {'size': {'longest_edge': 6144, 'shortest_edge': 4096}}
    assert make('qwen3_vl', image_processor=limits).image_processor.size['longest_edge'] == 6144
    assert limits == {'size': {'longest_edge': 6144, 'shortest_edge': 4096}}  # the config is left alone


@pytest.mark.parametrize(
    ('name', 'setting', 'size', 'of_model'),
    [
        ('qwen2_vl', 'patch_size', 28, '14'),
        ('qwen2_5_vl', 'merge_size', 4, '2'),
        ('qwen3_vl', 'temporal_patch_size', 1, '2'),
        ('internvl', 'size', {'height': 112, 'width': 112}, r"{'height': \d+, 'width': \d+}"),
    ],
)
def test_patches_and_tiles_of_another_size_than_the_models(name, setting, size, of_model, make):
    says = rf'{setting}={size}, but the vision encoder of the model is built for {of_model}; remove {setting}'
    with pytest.raises(ConfigError, match=f'image_processor: {says}'):
        make(name, image_processor={setting: size})
    same = make(name).image_processor
    make(name, image_processor={setting: dict(same.size) if setting == 'size' else getattr(same, setting)})


def test_images_of_many_sizes_for_a_tower_of_one(make):
    with pytest.raises(ConfigError, match='does not make images of one size; set height and width'):
        make('llava', image_processor={'do_center_crop': False})


def test_mistakes_in_names(make, tmp_path):
    with pytest.raises(ConfigError, match=r"prompt_template 'vicunja' does not exist, did you mean 'vicuna'?"):
        make('llama', prompt_template='vicunja')
    with pytest.raises(ModelError, match=r'has no config.json; expected a Hugging Face model folder'):
        type(make('llama'))(str(tmp_path))


def test_new_tokens_are_one_token_each(make, talk):
    mine, plain = make('qwen2', special_tokens=('<answer>', '<|im_end|>')), make('qwen2')
    assert mine.special_tokens == ('<answer>',)  # the other one is no news
    assert len(mine.tokenizer) == len(plain.tokenizer) + 1
    assert mine.tokenizer.decode([len(plain.tokenizer)]) == '<answer>'
    before, after = (p.tokenize(talk(('user', 'x'), ('assistant', 'y'))).input_ids.tolist() for p in (plain, mine))
    assert before == after


def test_stop_tokens_end_an_answer(make):
    assert make('smolvlm').stop_token_ids() == [make('smolvlm').tokenizer.convert_tokens_to_ids('<end_of_utterance>')]
    llama = make('llama')
    expected = {9, *llama.tokenizer.convert_tokens_to_ids(['<|eot_id|>'])}
    assert set(llama.stop_token_ids(9)) == expected
    assert make('llama').stop_token_ids([3, 9]) == sorted({3, *expected})
