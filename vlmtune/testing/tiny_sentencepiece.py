"""A tiny tokenizer.model, the file of SentencePiece, for families whose checkpoints bring one."""

import json
import struct
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlmtune.layouts.sentencepiece import MODEL_FILE, SPACE, fast_tokenizer
from vlmtune.testing.tiny_tokenizers import CORPUS, TOKENIZERS, TinyTokenizer

_MERGES = 150
_CONTROL = ('<unk>', '<s>', '</s>')
_NORMAL, _UNKNOWN, _IS_CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type
_FLAGS = dict(lstrip=False, rstrip=False, normalized=False, single_word=False)


def write_tokenizer_model(name: str, path: Path, *, prefix: bool) -> PreTrainedTokenizerFast:
    """Write tokenizer.model and tokenizer_config.json of the tokenizer ``TOKENIZERS[name]``, and read them.

    Tokens in ``<|...|>`` take the places of spare pieces, as those of InternLM2 do; others come behind the pieces.

    Args:
        name: a key of the table, whose text vocabulary is another one here.
        path: an existing folder.
        prefix: a space is put before every text, as Llama does and InternLM2 does not.
    """
    spec = TOKENIZERS[name]
    learned = _learned_pieces()
    spare = [token for token in spec.trailing if token.startswith('<|')]
    pieces = [
        *((text, 0.0, _UNKNOWN if i == 0 else _IS_CONTROL) for i, text in enumerate(_CONTROL)),
        *((f'<0x{byte:02X}>', 0.0, _BYTE) for byte in range(256)),
        *((text, -float(rank), _NORMAL) for rank, text in enumerate(learned)),
        *((f'[UNUSED_TOKEN_{i}]', 0.0, _USER_DEFINED) for i in range(len(spare))),
    ]
    trainer = _message((3, 2), (35, 1))  # a byte-pair model, with bytes in place of unknown characters
    normalizer = _message((3, int(prefix)), (4, 0))
    model = _message(*((1, _piece(*piece)) for piece in pieces), (2, trainer), (3, normalizer))
    (path / MODEL_FILE).write_bytes(model)
    rest = [token for token in (*spec.trailing, *spec.plain) if token not in spare]
    added = {**dict(enumerate(_CONTROL)), **dict(enumerate([*spare, *rest], len(pieces) - len(spare)))}
    config = json.dumps(_config(spec, added), indent=2)
    (path / 'tokenizer_config.json').write_text(config + '\n', encoding='utf-8')
    return fast_tokenizer(path)


def _learned_pieces() -> list[str]:
    """Merged pieces in the order in which they were merged, then single characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(' ', SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE, 'merged_with_next')
    letters = len({letter for line in CORPUS for letter in line})
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=letters + _MERGES, show_progress=False))
    vocabulary = tokenizer.get_vocab()
    texts = sorted(vocabulary, key=vocabulary.__getitem__)
    return [text for text in texts if len(text) > 1] + [text for text in texts if len(text) == 1]


def _config(spec: TinyTokenizer, added: dict[int, str]) -> dict[str, object]:
    roles = {'bos_token': spec.bos, 'eos_token': spec.eos, 'pad_token': spec.pad, 'unk_token': spec.unk}
    return {
        **{role: token for role, token in roles.items() if token is not None},
        'add_bos_token': spec.adds_bos,
        'added_tokens_decoder': {
            str(i): {'content': token, 'special': token not in spec.plain, **_FLAGS} for i, token in added.items()
        },
        'additional_special_tokens': list(spec.trailing),
        'chat_template': spec.chat_template,
        'model_max_length': 2048,
    }


# ---- protocol buffers


def _piece(text: str, score: float, kind: int) -> bytes:
    return _message((1, text.encode()), (2, score), (3, kind))


def _message(*fields: tuple[int, int | float | bytes]) -> bytes:
    made = b''
    for number, value in fields:
        if isinstance(value, bytes):
            made += _varint(number << 3 | 2) + _varint(len(value)) + value
        elif isinstance(value, float):
            made += _varint(number << 3 | 5) + struct.pack('<f', value)
        else:
            made += _varint(number << 3) + _varint(value)
    return made


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])
