"""From a conversation to a sample: which turns are learned."""

from dataclasses import replace

import pytest

from vlmtune.data import chat_template_map_fn, plain_text_map_fn
from vlmtune.structures import IGNORE_INDEX
from vlmtune.utils.errors import ConfigError, DataError


@pytest.fixture
def learn(processor, talk):
    """``learn('last_turn', None, True)``: the answers that are learned, by rule and by the messages' own flags."""
    mine = processor('qwen2')

    def run(rule, *flags):
        whole = talk(
            ('user', 'a?'), ('assistant', 'A'), ('user', 'b?'), ('assistant', 'B'), ('user', 'c?'), ('assistant', 'C')
        )
        messages = list(whole.messages)
        for i, flag in enumerate(flags):
            messages[2 * i + 1] = replace(messages[2 * i + 1], loss=flag)
        sample = chat_template_map_fn(
            replace(whole, messages=tuple(messages)), processor=mine, image_sizes=(), loss=rule
        )
        return mine.tokenizer.decode(sample.labels[sample.labels != IGNORE_INDEX]).replace('<|im_end|>', '')

    return run


@pytest.mark.parametrize(
    ('rule', 'flags', 'expected'),
    [
        ('all_turns', (), 'ABC'),
        ('last_turn', (), 'C'),
        ('first_turn', (), 'A'),
        ('all_turns', (False,), 'BC'),
        ('last_turn', (True, None, False), 'A'),
        ('first_turn', (None, True), 'AB'),
        ('none', (None, True), 'B'),
    ],
)
def test_rules_and_flags(rule, flags, expected, learn):
    assert learn(rule, *flags) == expected


def test_nothing_to_learn(learn):
    with pytest.raises(DataError, match='has no assistant turn to learn'):
        learn('all_turns', False, False, False)
    with pytest.raises(DataError, match='has no assistant turn to learn'):
        learn('none')


def test_an_unknown_rule_is_no_mistake_of_the_row(learn):
    """Or ``on_bad_sample='skip'`` would skip every row of the data set."""
    with pytest.raises(ConfigError, match="loss='every_turn' is unknown; expected one of all_turns, last_turn"):
        learn('every_turn')


def test_users_and_systems_are_never_learned(processor, talk):
    mine = processor('qwen2')
    whole = talk(('system', 'S'), ('user', 'a?'), ('assistant', 'A'))
    flagged = replace(whole, messages=tuple(replace(message, loss=True) for message in whole.messages))
    sample = chat_template_map_fn(flagged, processor=mine, image_sizes=(), loss='none')
    assert mine.tokenizer.decode(sample.labels[sample.labels != IGNORE_INDEX]) == 'A<|im_end|>'


def test_plain_text_is_learned_to_its_end(processor, talk):
    mine = processor('llama')
    sample = plain_text_map_fn(talk(('assistant', 'Once upon <|eot_id|> a time.')), processor=mine)
    assert sample.input_ids.tolist() == sample.labels.tolist()
    assert sample.input_ids[-1] == mine.tokenizer.eos_token_id
    assert mine.tokenizer.decode(sample.input_ids[:-1]) == 'Once upon <|eot_id|> a time.'


def test_plain_text_takes_no_images(processor, talk, image_mark):
    with pytest.raises(DataError, match='plain_text_map_fn takes text only, but the row has 1 images'):
        plain_text_map_fn(talk(('assistant', image_mark, 'x')), processor=processor('llava'))
