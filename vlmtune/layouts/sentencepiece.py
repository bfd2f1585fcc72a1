"""tokenizer.model, a file of SentencePiece, as a fast tokenizer, without SentencePiece and without running code of it.

The file is a protocol buffer (``sentencepiece_model.proto`` of github.com/google/sentencepiece); what is read of it are
its pieces and the few settings that change how text is cut. Byte-pair models only, as InternLM2, Llama and
MiniCPM have.

The result cuts text as SentencePiece does, but for some rare cases: two overlapping merges into the same piece may be
tried in the other order; a piece is never made if one of its characters is no piece itself (a warning counts those); a
text that is nothing but one user-defined symbol gets no prefix; nor does, in tokenizers with ``legacy: false``, a text
that starts with a space (so it is in the fast Llama of transformers).
"""

import logging
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from vlmtune.utils.errors import ModelError
from vlmtune.utils.pretrained import load_pretrained, read_source_json

logger = logging.getLogger(__name__)

MODEL_FILE = 'tokenizer.model'
SPACE = '▁'  # how SentencePiece writes a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # ModelProto.SentencePiece.Type
_VARINT_BITS, _SIZES = 63, {1: 8, 5: 4}  # sizes by wire type
# The pairs of pieces grow with the square of a piece's length. Real models: 262,144 pieces at most, of 6 on average.
_MOST_BYTES, _MOST_PIECES, _MOST_CHARACTERS, _LONGEST_PIECE = 1 << 24, 500_000, 4_000_000, 1000
_BPE = 2  # TrainerSpec.ModelType
_NAMED = ('unk_token', 'bos_token', 'eos_token', 'pad_token', 'sep_token', 'cls_token', 'mask_token')
_PASSED_ON = ('model_max_length', 'padding_side', 'truncation_side', 'clean_up_tokenization_spaces')


@dataclass(frozen=True)
class Pieces:
    """What is in a tokenizer.model.

    Attributes:
        texts, scores, kinds: of every piece, by token id; kinds as ``ModelProto.SentencePiece.Type`` counts them.
        unknown: the text of the unknown piece.
        byte_fallback: characters that are no piece are written as their bytes.
        prefix: a space is put before every text.
        squeezes: spaces at both ends and repeated ones are dropped.
        character_map: the compiled table of a normalisation; empty for none.
    """

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    unknown: str
    byte_fallback: bool
    prefix: bool
    squeezes: bool
    character_map: bytes


def read_pieces(path: Path) -> Pieces:
    """Read a tokenizer.model.

    Raises:
        ModelError: it is none, or of a sort that is not supported.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f'it has more than {_MOST_BYTES} bytes')
        parts = list(islice(_fields(path.read_bytes()), _MOST_PIECES + 1))
        if len(parts) > _MOST_PIECES:
            raise ValueError(f'it has more than {_MOST_PIECES} pieces')
        pieces = [dict(_fields(value)) for number, value in parts if number == 1]
        trainer, normalizer = (dict(_fields(dict(parts).get(number, b''))) for number in (2, 3))
        texts = tuple(piece[1].decode() for piece in pieces)
        if max(map(len, texts), default=0) > _LONGEST_PIECE or sum(map(len, texts)) > _MOST_CHARACTERS:
            raise ValueError(f'a piece has more than {_LONGEST_PIECE} characters, or all more than {_MOST_CHARACTERS}')
        scores = tuple(struct.unpack('<f', piece[2])[0] if 2 in piece else 0.0 for piece in pieces)
        unknown = trainer.get(45, b'<unk>').decode()
    except (OSError, IndexError, KeyError, AttributeError, TypeError, ValueError, struct.error) as error:
        raise ModelError(
            f'{path} cannot be read as a SentencePiece model ({str(error)[:100]}); copy it again'
        ) from error
    if not pieces or trainer.get(3, 1) != _BPE:
        kind = 'no pieces' if not pieces else f'a model of type {trainer.get(3, 1)}'
        raise ModelError(f'{path} holds {kind}; expected a byte-pair model of SentencePiece (type {_BPE})')
    if trainer.get(24, 0) or not normalizer.get(5, 1):
        raise ModelError(f'{path} writes spaces behind words or not as {SPACE}, which is not supported')
    return Pieces(
        texts,
        scores,
        kinds=tuple(piece.get(3, _NORMAL) for piece in pieces),
        unknown=unknown,
        byte_fallback=bool(trainer.get(35, 0)),
        prefix=bool(normalizer.get(3, 1)),
        squeezes=bool(normalizer.get(4, 1)),
        character_map=normalizer.get(2, b''),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a protocol buffer message: number and value, which is an int or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, at = _varint(data, at)
        elif key & 7 in _SIZES:
            size = _SIZES[key & 7]
        else:
            raise ValueError(f'byte {at - 1} starts no field')
        if at + size > len(data):
            raise ValueError(f'it ends in the middle of field {key >> 3}')
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if shift > _VARINT_BITS:
            raise ValueError('a number of more than ten bytes')
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


# ---- the tokenizer


def write_tokenizer(source: Path, target: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template of a model folder, for transformers to read.

    Raises:
        ModelError: ``source`` has neither a tokenizer.model nor a tokenizer.json, or they are broken.
    """
    if (source / MODEL_FILE).is_file() or not (source / 'tokenizer.json').is_file():
        tokenizer = fast_tokenizer(source)
    else:  # as official fast tokenizers save themselves; transformers' own class needs no code to read it
        tokenizer = load_pretrained(PreTrainedTokenizerFast, str(source))
    tokenizer.save_pretrained(target)


def fast_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder that holds tokenizer.model, with its added tokens and its chat template.

    Read are tokenizer.model, tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat_template.jinja;
    a tokenizer.json beside them is not. What ``tokenizer_class`` names is not looked up.

    Raises:
        ModelError: tokenizer.model is missing or of another sort, or added tokens do not fit it.
    """
    folder = Path(folder)
    if not (folder / MODEL_FILE).is_file():
        raise ModelError(f'{folder} has no {MODEL_FILE}; copy it from where the model comes from')
    pieces = read_pieces(folder / MODEL_FILE)
    config = {**_read_json(folder, 'special_tokens_map.json'), **_read_json(folder, 'tokenizer_config.json')}
    named = {name: _text(config[name]) for name in _NAMED if config.get(name)}
    for name, kind, at in (('unk_token', _UNKNOWN, 0), ('bos_token', _CONTROL, 0), ('eos_token', _CONTROL, 1)):
        of_kind = [text for text, k in zip(pieces.texts, pieces.kinds, strict=True) if k == kind]
        if name not in named and len(of_kind) > at:
            named[name] = of_kind[at]
    extra = [_text(token) for token in config.get('additional_special_tokens') or ()]
    added = _added_tokens(folder, config, pieces, special={*named.values(), *extra})
    prefix = pieces.prefix and config.get('add_prefix_space') is not False
    backend = _backend(pieces, added, prefix=prefix, everywhere=config.get('legacy') is not False)
    _check_ids(folder, backend, added)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **named,
        additional_special_tokens=[token for token in extra if token not in named.values()],
        add_bos_token=bool(config.get('add_bos_token', True)),
        add_eos_token=bool(config.get('add_eos_token', False)),
        chat_template=_chat_template(folder, config),
        **{'clean_up_tokenization_spaces': False, **{name: config[name] for name in _PASSED_ON if name in config}},
    )


def _backend(pieces: Pieces, added: Mapping[int, AddedToken], *, prefix: bool, everywhere: bool) -> Tokenizer:
    """The cutting itself; a prefix stands before every text between two added tokens, or before the first only."""
    texts = [added[i].content if i in added else text for i, text in enumerate(pieces.texts)]
    vocabulary = {text: i for i, text in enumerate(texts)}
    backend = Tokenizer(
        BPE(
            vocabulary,
            _merges(pieces, texts),
            unk_token=added[vocabulary[pieces.unknown]].content if pieces.unknown in vocabulary else None,
            fuse_unk=True,
            byte_fallback=pieces.byte_fallback,
        )
    )
    symbols = [text for text, kind in zip(pieces.texts, pieces.kinds, strict=True) if kind == _USER_DEFINED]
    backend.normalizer = _normalizer(pieces, symbols, prefix=prefix and everywhere)
    if prefix and not everywhere:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme='first', split=False)
    steps: list[Any] = [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(' ', left=1)] if prefix else [])])
    backend.add_tokens([added[i] for i in sorted(added)])
    return backend


def _merges(pieces: Pieces, texts: list[str]) -> list[tuple[str, str]]:
    """Pairs of pieces that are a piece together, the ones with the highest score first, as SentencePiece takes them."""
    ids = {text: i for i, text in enumerate(texts) if pieces.kinds[i] == _NORMAL and text == pieces.texts[i]}
    single = {text for text in ids if len(text) == 1}
    merges = []
    unmade = 0
    for i in sorted(ids.values(), key=lambda i: (-pieces.scores[i], i)):
        text = texts[i]
        halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        merges += sorted(
            (pair for pair in halves if pair[0] in ids and pair[1] in ids), key=lambda p: (ids[p[0]], p[1])
        )
        unmade += not single.issuperset(text)
    if unmade:
        logger.warning(
            '%d pieces of the tokenizer hold characters that are no piece: texts are cut without them', unmade
        )
    return merges


def _normalizer(pieces: Pieces, symbols: list[str], *, prefix: bool) -> normalizers.Normalizer:
    steps: list[Any] = []
    if pieces.character_map:
        try:
            steps.append(normalizers.Precompiled(pieces.character_map))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ModelError(f'{MODEL_FILE}: its table of characters cannot be read; copy it again') from error
    if pieces.squeezes:
        steps += [normalizers.Replace(Regex(r'\A +| +\z'), ''), normalizers.Replace(Regex(' {2,}'), ' ')]
    steps.append(normalizers.Replace(' ', SPACE))
    if prefix:
        steps.append(normalizers.Prepend(SPACE))
        if symbols:  # these are looked for in their normalised form, which must be what they are
            alone = '|'.join(map(re.escape, symbols))
            steps.append(normalizers.Replace(Regex(rf'\A{SPACE}(?=(?:{alone})\z)'), ''))
    return normalizers.Sequence(steps)


# ---- added tokens and files


def _added_tokens(
    folder: Path, config: Mapping[str, Any], pieces: Pieces, *, special: set[str]
) -> dict[int, AddedToken]:
    """Tokens that are found before the text is cut, by id: those of the files, then those of the pieces."""
    added: dict[int, AddedToken] = {}
    for name, i in _read_json(folder, 'added_tokens.json').items():
        added[int(i)] = AddedToken(name, normalized=False, special=name in special)
    for i, token in (config.get('added_tokens_decoder') or {}).items():
        flags = {key: value for key, value in token.items() if key in ('lstrip', 'rstrip', 'single_word', 'normalized')}
        is_special = bool(token.get('special')) or token['content'] in special
        added[int(i)] = AddedToken(token['content'], special=is_special, **{'normalized': False, **flags})
    for i, (text, kind) in enumerate(zip(pieces.texts, pieces.kinds, strict=True)):
        if kind in (_UNKNOWN, _CONTROL) or text in special:
            added.setdefault(i, AddedToken(text, normalized=False, special=True))
        elif kind == _USER_DEFINED:
            added.setdefault(i, AddedToken(text, normalized=True, special=False))
    return added


def _check_ids(folder: Path, backend: Tokenizer, added: Mapping[int, AddedToken]) -> None:
    for i, token in added.items():
        if backend.token_to_id(token.content) != i:
            raise ModelError(
                f'{folder}: the added token {token.content!r} has id {i} in tokenizer_config.json or '
                f'added_tokens.json, but {backend.token_to_id(token.content)} next to {MODEL_FILE}; these files '
                'belong to different models'
            )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    return read_source_json(str(folder), name) or {}


def _text(token: Any) -> str:
    return str(token['content'] if isinstance(token, Mapping) else token)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> Any:
    file = folder / 'chat_template.jinja'
    if file.is_file():
        return file.read_text('utf-8')
    template = config.get('chat_template')
    return {each['name']: each['template'] for each in template} if isinstance(template, list) else template
