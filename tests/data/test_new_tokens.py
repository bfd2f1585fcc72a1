"""Tokens that a recipe adds for its texts."""

import pytest
from transformers import AutoTokenizer

from vlmtune.utils.errors import ConfigError

TOKENS = ['<table_begin>', '<table_end>']


def ids_of(mine, texts):
    return mine.tokenizer.convert_tokens_to_ids(texts)


@pytest.mark.parametrize('name', ['qwen2_vl', 'qwen3_vl', 'llava', 'llama'])
def test_each_is_one_token_in_questions_and_answers(name, processor, talk):
    mine = processor(name, new_tokens=TOKENS, **({'prompt_template': 'vicuna'} if name == 'llava' else {}))
    assert mine.new_tokens == tuple(TOKENS)
    asked = talk(('user', 'What is <table_begin>?'), ('assistant', '<table_begin>1<table_end> <|im_end|>'))
    sample = mine.tokenize(asked)
    begin, end = ids_of(mine, TOKENS)
    assert sample.input_ids.tolist().count(begin) == 2
    learned = sample.labels[sample.labels >= 0].tolist()
    assert [token for token in learned if token in (begin, end)] == [begin, end]
    answer = mine.tokenizer.decode(learned, skip_special_tokens=True)
    assert answer.strip().startswith('<table_begin>1<table_end> <|im_end|>')  # the last is text, as anywhere in a text


def test_a_processor_that_was_saved_reads_texts_in_the_same_way(processor, talk, tmp_path):
    mine = processor('qwen2_vl', new_tokens=TOKENS)
    mine.save(tmp_path)
    (tmp_path / 'config.json').write_text(mine.config.to_json_string())
    saved = type(mine)(str(tmp_path))
    asked = talk(('user', 'x\n'), ('assistant', '\n<table_begin>\n1 <table_end>'))
    assert saved.tokenize(asked).input_ids.tolist() == mine.tokenize(asked).input_ids.tolist()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert not set(TOKENS) & set(tokenizer.all_special_tokens)
    assert tokenizer('<table_end>')['input_ids'] == ids_of(mine, ['<table_end>'])


def test_what_the_tokenizer_knows_is_not_new(processor):
    mine = processor('qwen2', new_tokens=['a', '<x>', '<x>'])
    assert mine.new_tokens == ('<x>',)
    assert len(mine.tokenizer) == len(processor('qwen2').tokenizer) + 1


@pytest.mark.parametrize(
    ('tokens', 'message'),
    [
        ('<table>', r"new_tokens='<table>': expected a list of texts"),
        (['<a>', ' '], 'expected a list of texts'),
        (['<a>', 3], 'expected a list of texts'),
        (None, 'new_tokens=None: expected a list of texts'),
        (['<|im_end|>'], r"'<\|im_end\|>' is a control token of this model, which texts cannot hold; rename it"),
    ],
)
def test_what_cannot_be_a_new_token(tokens, message, processor):
    with pytest.raises(ConfigError, match=message):
        processor('qwen2', new_tokens=tokens)


@pytest.mark.parametrize('tokens', ['<ref>', ['<a>', ''], ['<a>', None], None])
def test_what_cannot_be_a_control_token(tokens, processor):
    with pytest.raises(ConfigError, match=r'^special_tokens=.*: expected a list of texts'):
        processor('qwen2', special_tokens=tokens)
