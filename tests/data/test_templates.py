"""The named templates write what their models were trained with."""

import pytest

from vlmtune.data.templates import TEMPLATES, find_template
from vlmtune.structures import IGNORE_INDEX
from vlmtune.utils.errors import ConfigError

TALK = (('system', 'Be brief.'), ('user', 'Hi'), ('assistant', 'Hello'), ('user', 'And?'), ('assistant', 'No'))
CHATML = (
    '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n'
    '<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n'
)
RENDERED = {
    'chatml': CHATML,
    'qwen_vl': CHATML,
    'internvl': CHATML,
    'points': CHATML,
    'internlm2_chat': CHATML,
    'vicuna': 'Be brief. USER: Hi ASSISTANT: Hello<|im_end|>USER: And? ASSISTANT: No<|im_end|>',
    'alpaca': (
        'Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello<|im_end|>\n\n'
        '### Instruction:\nAnd?\n\n### Response:\nNo<|im_end|>\n\n'
    ),
    'llama3_chat': (
        '<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n'
        'Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\nNo<|eot_id|>'
    ),
    'paligemma': 'Be brief.\nHi\nHello<eos>',
}
PROMPTS = {
    'vicuna': 'ASSISTANT:',
    'alpaca': '### Response:\n',
    'llama3_chat': '<|start_header_id|>assistant<|end_header_id|>\n\n',
    'paligemma': 'Hi\n',
}
BASES = {'llama3_chat': ('llama', '<|begin_of_text|>'), 'paligemma': ('paligemma', '<bos>')}
ENDS = {'llama3_chat': '<|eot_id|>', 'paligemma': '<eos>'}


def base_of(name):
    """A tiny model whose tokenizer has the control tokens of a template, and the bos that it writes."""
    return BASES.get(name, ('qwen2', ''))


def turns_of(name):
    return TALK[:3] if name == 'paligemma' else TALK  # it takes one question


def test_all_are_tested():
    assert set(RENDERED) == set(TEMPLATES)


@pytest.mark.parametrize('name', TEMPLATES)
def test_what_it_writes(name, processor, talk):
    model, bos = base_of(name)
    mine = processor(model, prompt_template=name)
    assert mine.renderer.render(talk(*turns_of(name))).text == bos + RENDERED[name]
    asked = mine.renderer.render(talk(*TALK[:2]), add_generation_prompt=True).text
    assert asked.endswith(PROMPTS.get(name, '<|im_start|>assistant\n'))
    assert (bos + RENDERED[name]).startswith(asked)  # what is trained goes on from what is asked


@pytest.mark.parametrize('name', TEMPLATES)
def test_answers_and_ends_are_learned(name, processor, talk):
    model, _ = base_of(name)
    mine = processor(model, prompt_template=name)
    sample = mine.tokenize(talk(*turns_of(name)))
    learned = mine.tokenizer.decode(sample.labels[sample.labels != IGNORE_INDEX])
    end, space = ENDS.get(name, '<|im_end|>'), (' ' if name == 'vicuna' else '')
    assert learned == ''.join(f'{space}{text}{end}' for role, text in turns_of(name) if role == 'assistant')


def test_bos_of_a_tokenizer_that_has_one(processor, talk):
    assert (
        processor('llama', prompt_template='vicuna')
        .renderer.render(talk(*TALK))
        .text.startswith('<|begin_of_text|>Be brief.')
    )


@pytest.mark.parametrize(
    ('name', 'model'), [('vicuna', 'llava'), ('qwen_vl', 'qwen2_vl'), ('internvl', 'internvl'), ('points', 'points')]
)
def test_image_marks(name, model, processor, talk, image_mark):
    mine = processor(model, prompt_template=name)
    text = mine.renderer.render(talk(('user', image_mark, 'What?'), ('assistant', 'x'))).text
    qwen = '<|vision_start|><|image_pad|><|vision_end|>'
    marks = {'vicuna': '<image>\n', 'internvl': '<IMG_CONTEXT>\n', 'qwen_vl': qwen, 'points': f'{qwen}\n'}
    assert f'{marks[name]}What?' in text


def test_find_template():
    assert find_template('chatml') == TEMPLATES['chatml']
    with pytest.raises(
        ConfigError, match=r"prompt_template 'llama3' does not exist, did you mean 'llama3_chat'\?; there are chatml,"
    ):
        find_template('llama3')
    with pytest.raises(ConfigError, match="'zzz' does not exist; there are chatml,"):
        find_template('zzz')
