"""tokenizer.model files, cut as SentencePiece does: goldens/make_sentencepiece.py says how the numbers were made."""

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from vlmtune.layouts.sentencepiece import fast_tokenizer, read_pieces, write_tokenizer
from vlmtune.utils.errors import ModelError

GOLDENS = Path(__file__).resolve().parents[1] / 'goldens'
MODELS = ('llama', 'internlm2', 'symbols', 'no_bytes', 'normalised')
ADDED = ('<image>', '</image>')
LEAST = 2200
SPECIAL = dict(unk_token='<unk>', bos_token='<s>', eos_token='</s>')


@pytest.fixture(scope='module')
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / 'sentencepiece.safetensors')


def rows(golden: dict[str, torch.Tensor], name: str) -> list[list[int]]:
    parts = golden[f'{name}/values'].split(golden[f'{name}/lengths'].tolist())
    return [part.tolist() for part in parts]


@pytest.fixture(scope='module')
def texts(golden: dict[str, torch.Tensor]) -> list[str]:
    found = [bytes(row).decode() for row in rows(golden, 'texts')]
    assert len(found) >= LEAST
    return found


@pytest.fixture
def folder(golden: dict[str, torch.Tensor], tmp_path: Path) -> Callable[..., Path]:
    """``folder('llama', config)``: a model folder with this tokenizer.model and tokenizer_config.json."""

    def make(name: str, config: dict[str, Any] | None = None, **files: dict[str, Any]) -> Path:
        (tmp_path / 'tokenizer.model').write_bytes(golden[f'{name}/model'].numpy().tobytes())
        for file, content in {'tokenizer_config': config or {}, **files}.items():
            (tmp_path / f'{file}.json').write_text(json.dumps(content), encoding='utf-8')
        return tmp_path

    return make


def differences(tokenizer: Any, texts: list[str], expected: list[list[int]], **options: Any) -> list[str]:
    made = tokenizer(texts, **options)['input_ids']
    return [text for text, mine, theirs in zip(texts, made, expected, strict=True) if mine != theirs]


@pytest.mark.parametrize('name', MODELS)
def test_texts_are_cut_as_sentencepiece_cuts_them(name, golden, texts, folder):
    tokenizer = fast_tokenizer(folder(name))
    expected = rows(golden, f'{name}/pieces')
    # Control tokens are text to SentencePiece. A text of one symbol alone is the exception that the module names.
    assert differences(tokenizer, texts, expected, add_special_tokens=False, split_special_tokens=True) == []
    for text, ids in zip(texts, expected, strict=True):
        if name in ('llama', 'internlm2') and '\x00' not in text:
            assert tokenizer.decode(ids) == text.replace('▁', ' ')


@pytest.mark.parametrize(('legacy', 'name'), [(None, 'legacy'), (True, 'legacy'), (False, 'new')])
def test_prefixes_around_added_tokens_are_those_of_the_slow_tokenizer(legacy, name, golden, texts, folder):
    config = dict(SPECIAL, additional_special_tokens=list(ADDED), legacy=legacy)
    tokenizer = fast_tokenizer(folder('llama', config))
    differ = differences(tokenizer, texts, rows(golden, f'llama/{name}'), add_special_tokens=False)
    # As in the fast Llama of transformers, a first space is taken for the prefix where only the first text gets one.
    assert [text for text in differ if legacy is not False or text[0] not in ' ▁'] == []


def test_what_is_written_reads_the_same(golden, texts, folder, tmp_path):
    source = folder('internlm2', dict(SPECIAL, pad_token='</s>', chat_template='{{ 1 }}', padding_side='left'))
    write_tokenizer(source, tmp_path / 'view')
    read = AutoTokenizer.from_pretrained(tmp_path / 'view')
    assert differences(read, texts[:300], [[1, *ids] for ids in rows(golden, 'internlm2/pieces')[:300]]) == [
        text for text in texts[:300] if any(token in text for token in SPECIAL.values())
    ]
    assert (read.bos_token, read.pad_token, read.chat_template, read.padding_side) == ('<s>', '</s>', '{{ 1 }}', 'left')
    assert len(read) == len(read_pieces(source / 'tokenizer.model').texts)


def test_added_tokens_keep_their_ids(folder):
    pieces = len(read_pieces(folder('llama') / 'tokenizer.model').texts)
    spare = read_pieces(folder('internlm2') / 'tokenizer.model').texts.index('[UNUSED_TOKEN_2]')
    decoder = {str(spare): dict(content='<|im_end|>', special=True), str(pieces): dict(content='<box>', special=False)}
    extra = {'eos_token': '</s>', 'pad_token': dict(content='<pad>')}
    tokenizer = fast_tokenizer(
        folder(
            'internlm2',
            dict(added_tokens_decoder=decoder, add_bos_token=False, add_eos_token=True),
            added_tokens={'<pad>': pieces + 1},
            special_tokens_map=extra,
        )
    )
    ids = tokenizer('a<|im_end|><box>[UNUSED_TOKEN_2]')['input_ids']
    assert tokenizer.convert_ids_to_tokens(ids[:3]) == ['a', '<|im_end|>', '<box>']
    assert ids[1:3] == [spare, pieces]
    assert ids.count(spare) == 1  # the name of the spare piece is a text now
    assert ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.pad_token_id == pieces + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == 'a<box>[UNUSED_TOKEN_2]'


def test_files_of_different_models(folder):
    decoder = {'5000': dict(content='<image>', special=True)}
    with pytest.raises(
        ModelError, match=r"the added token '<image>' has id 5000 in tokenizer_config\.json or .* but 600 "
    ):
        fast_tokenizer(folder('llama', dict(added_tokens_decoder=decoder)))


# ---- files that are none


def varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def message(*fields: tuple[int, int | float | bytes]) -> bytes:
    """A protocol buffer message."""
    made = b''
    for number, value in fields:
        if isinstance(value, bytes):
            made += varint(number << 3 | 2) + varint(len(value)) + value
        elif isinstance(value, float):
            made += varint(number << 3 | 5) + struct.pack('<f', value)
        else:
            made += varint(number << 3) + varint(value)
    return made


PIECES = [(1, message((1, b'<unk>'), (3, 2))), *((1, message((1, c.encode()), (2, -float(ord(c))))) for c in 'abc')]
BPE = (2, message((3, 2)))


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (b'', 'holds no pieces; expected a byte-pair model'),
        (b'\x0a\xff\x01', 'cannot be read as a SentencePiece model'),
        (b'{"model": 1}', r'cannot be read as a SentencePiece model \(byte 0 starts no field\)'),
        (b'version https://git-lfs.github.com/spec/v1\n', 'cannot be read as a SentencePiece model'),
        (message(*PIECES, (2, message((3, 1)))), 'holds a model of type 1; expected a byte-pair model'),
        (message(*PIECES, (2, message((3, 2), (24, 1)))), 'writes spaces behind words'),
        (message(*PIECES, BPE, (3, message((5, 0)))), 'writes spaces behind words or not as'),
        (
            message(*PIECES, BPE) + b'\x1a\x05\x18\x01',
            r'cannot be read as a SentencePiece model \(it ends in the middle',
        ),
        (message((1, 7), BPE), 'cannot be read as a SentencePiece model'),
    ],
)
def test_files_that_are_none(content, reason, tmp_path):
    (tmp_path / 'tokenizer.model').write_bytes(content)
    with pytest.raises(ModelError, match=rf'tokenizer\.model {reason}'):
        fast_tokenizer(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(ModelError, match=r'has no tokenizer\.model; copy it'):
        write_tokenizer(tmp_path, tmp_path / 'view')


def test_pieces_that_cannot_be_made_are_counted(tmp_path, caplog):
    unmade = (1, message((1, 'aé'.encode()), (2, -1.0)))
    (tmp_path / 'tokenizer.model').write_bytes(message(*PIECES, unmade, BPE))
    with caplog.at_level(logging.WARNING):
        fast_tokenizer(tmp_path)
    assert '1 pieces of the tokenizer hold characters that are no piece' in caplog.text
