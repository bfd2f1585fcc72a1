"""A sample's tokens as people read them: runs of text, control tokens, and image tokens folded to a count."""

from dataclasses import dataclass
from itertools import groupby
from typing import Literal, TypeAlias

from vlmtune.data.processor import Processor
from vlmtune.structures import IGNORE_INDEX, Sample

RunKind: TypeAlias = Literal['text', 'control', 'image']


@dataclass(frozen=True)
class TokenRun:
    """Neighbouring tokens of one kind; ``text`` is '' for image tokens."""

    kind: RunKind
    learned: bool
    tokens: int
    text: str


def token_runs(sample: Sample, *, processor: Processor) -> list[TokenRun]:
    """The runs of a sample, in order; every token is in one."""
    tokenizer = processor.tokenizer
    image = processor.image_token_id if processor.family.has_vision else None
    control = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    learned = (sample.labels != IGNORE_INDEX).tolist()

    def key(token: tuple[int, bool]) -> tuple[RunKind, bool]:
        kind: RunKind = 'image' if token[0] == image else 'control' if token[0] in control else 'text'
        return kind, token[1]

    runs = []
    for (kind, is_learned), group in groupby(zip(sample.input_ids.tolist(), learned, strict=True), key):
        ids = [token for token, _ in group]
        text = '' if kind == 'image' else tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        runs.append(TokenRun(kind, is_learned, len(ids), text))
    return runs
