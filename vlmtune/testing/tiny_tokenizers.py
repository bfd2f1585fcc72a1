"""Byte-level BPE tokenizers of about 450 tokens that carry each family's special tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vlmtune.testing import tiny_chat_templates as templates

_MERGES = 200
_BYTES = 256
# Words with the space before them, single digits, punctuation with the newlines after it, newlines, other space. Like
# the families' own patterns it joins '?' and '\n' into one piece, so that a boundary inside a piece shows.
_PIECES = Regex(r' ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+\n*|\n+|\s+')
CORPUS = (
    'USER: What is in the image?\n\nASSISTANT: The image shows a red square on a white wall. ',
    'user\nWhat colour is the square in the picture?\nassistant\nThe colour of the square is blue.\n',
    'User: How many shapes are there? Assistant: There are two shapes: a small green circle and a large square.\n\n',
    # Makes newlines merge, as they do in real vocabularies.
    'One?\n\nTwo.\n\nThree:\n\nFour\n\nFive\n\nSix.\nSeven?\nEight:\n',
    'system\nYou are a helpful assistant.\n\nRead the receipt and answer with the total: 12.50 and the date.\n',
)


@dataclass(frozen=True)
class TinyTokenizer:
    """What a family's tokenizer adds to plain text.

    Attributes:
        leading: special tokens with the ids 0, 1, ...
        trailing: special tokens after the text vocabulary.
        plain: added tokens that are no special tokens (``skip_special_tokens`` keeps them).
        adds_bos: the tokenizer itself writes ``bos`` before every text.
        named: tokenizer attributes that name a token (``image_token``, ``boi_token``, ...).
    """

    eos: str
    pad: str
    bos: str | None = None
    unk: str | None = None
    leading: tuple[str, ...] = ()
    trailing: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    adds_bos: bool = False
    named: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None


_IM = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
_BOXES = (
    '<|object_ref_start|>',
    '<|object_ref_end|>',
    '<|box_start|>',
    '<|box_end|>',
    '<|quad_start|>',
    '<|quad_end|>',
)
_QWEN_VL = (*_IM, *_BOXES, '<|vision_start|>', '<|vision_end|>', '<|vision_pad|>', '<|image_pad|>', '<|video_pad|>')
_QWEN_IMAGE = '<|vision_start|><|image_pad|><|vision_end|>'
_LLAMA2 = ('<unk>', '<s>', '</s>')
_LLAMA3 = (
    '<|begin_of_text|>',
    '<|end_of_text|>',
    '<|finetune_right_pad_id|>',
    '<|start_header_id|>',
    '<|end_header_id|>',
)
_TILES = tuple(f'<row_{row}_col_{col}>' for row in range(1, 7) for col in range(1, 7))
_SMOLVLM = ('<|im_start|>', '<|im_end|>', '<fake_token_around_image>', '<image>', '<end_of_utterance>', '<global-img>')
_HELPFUL = 'You are a helpful assistant.'


def _qwen(trailing: tuple[str, ...], template: str, *, plain: tuple[str, ...] = ()) -> TinyTokenizer:
    return TinyTokenizer(eos='<|im_end|>', pad='<|endoftext|>', trailing=trailing, plain=plain, chat_template=template)


TOKENIZERS: Mapping[str, TinyTokenizer] = {
    'llama3': TinyTokenizer(
        bos='<|begin_of_text|>',
        eos='<|eot_id|>',
        pad='<|finetune_right_pad_id|>',
        trailing=(*_LLAMA3, '<|eot_id|>'),
        adds_bos=True,
        chat_template=templates.LLAMA3,
    ),
    'qwen2': _qwen(_IM, templates.chatml(system=_HELPFUL)),
    'qwen3': _qwen((*_IM, *_BOXES), templates.QWEN3, plain=('<think>', '</think>')),
    'qwen2_vl': _qwen(_QWEN_VL, templates.chatml(image=_QWEN_IMAGE, system=_HELPFUL)),
    'points': _qwen(_QWEN_VL, templates.chatml(system=_HELPFUL)),  # the template of a Qwen2.5, which knows no images
    'qwen3_vl': _qwen(_QWEN_VL, templates.chatml(image=_QWEN_IMAGE), plain=('<think>', '</think>')),
    'llava': TinyTokenizer(
        bos='<s>',
        eos='</s>',
        unk='<unk>',
        pad='<pad>',
        leading=_LLAMA2,
        trailing=('<image>', '<pad>'),
        adds_bos=True,
        chat_template=templates.LLAVA,
    ),
    'llava_onevision': _qwen((*_IM, '<image>', '<video>'), templates.LLAVA_ONEVISION),
    'internvl': TinyTokenizer(
        eos='<|im_end|>',
        pad='<|endoftext|>',
        trailing=(
            *_IM,
            '<img>',
            '</img>',
            '<IMG_CONTEXT>',
            '<quad>',
            '</quad>',
            '<ref>',
            '</ref>',
            '<box>',
            '</box>',
            '<video>',
        ),
        named={
            'start_image_token': '<img>',
            'end_image_token': '</img>',
            'context_image_token': '<IMG_CONTEXT>',
            'video_token': '<video>',
        },
        chat_template=templates.chatml(image=r'<IMG_CONTEXT>\n'),
    ),
    'smolvlm': TinyTokenizer(
        bos='<|im_start|>',
        eos='<end_of_utterance>',
        unk='<|endoftext|>',
        pad='<|im_end|>',
        leading=('<|endoftext|>', *_SMOLVLM[:2]),
        trailing=(*_TILES, *_SMOLVLM[2:]),
        named={
            'image_token': '<image>',
            'fake_image_token': '<fake_token_around_image>',
            'global_image_token': '<global-img>',
            'end_of_utterance_token': '<end_of_utterance>',
        },
        chat_template=templates.SMOLVLM,
    ),
    'gemma3': TinyTokenizer(
        bos='<bos>',
        eos='<eos>',
        unk='<unk>',
        pad='<pad>',
        leading=('<pad>', '<eos>', '<bos>', '<unk>'),
        trailing=('<start_of_turn>', '<end_of_turn>', '<start_of_image>', '<end_of_image>', '<image_soft_token>'),
        adds_bos=True,
        named={'boi_token': '<start_of_image>', 'eoi_token': '<end_of_image>', 'image_token': '<image_soft_token>'},
        chat_template=templates.GEMMA3,
    ),
    'internlm2': TinyTokenizer(
        bos='<s>',
        eos='</s>',
        unk='<unk>',
        pad='</s>',
        leading=_LLAMA2,
        trailing=('<|plugin|>', '<|interpreter|>', '<|action_end|>', '<|action_start|>', '<|im_end|>', '<|im_start|>'),
        adds_bos=True,
        chat_template=templates.INTERNLM2,
    ),
    'internvl2': TinyTokenizer(
        bos='<s>',
        eos='</s>',
        unk='<unk>',
        pad='</s>',
        leading=_LLAMA2,
        trailing=(
            *('<|im_end|>', '<|im_start|>', '<img>', '</img>', '<IMG_CONTEXT>'),
            *('<quad>', '</quad>', '<ref>', '</ref>', '<box>', '</box>'),
        ),
        adds_bos=True,
    ),
    'minicpmv': TinyTokenizer(
        bos='<s>',
        eos='</s>',
        unk='<unk>',
        pad='<unk>',
        leading=_LLAMA2,
        trailing=('<image>', '</image>', '<slice>', '</slice>', '<box>', '</box>'),
        adds_bos=True,
    ),
    'paligemma': TinyTokenizer(
        bos='<bos>',
        eos='<eos>',
        unk='<unk>',
        pad='<pad>',
        leading=('<pad>', '<eos>', '<bos>', '<unk>'),
        trailing=('<image>',),
        plain=(*(f'<loc{i:04}>' for i in range(1024)), *(f'<seg{i:03}>' for i in range(128))),
        adds_bos=True,
        named={'image_token': '<image>'},
    ),
}


def build_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Train the tokenizer ``TOKENIZERS[name]``: some milliseconds, the same ids every time."""
    spec = TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE(unk_token=spec.unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_PIECES, 'isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(spec.leading) + _BYTES + _MERGES,
        special_tokens=list(spec.leading),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in spec.trailing])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in spec.plain])
    if spec.adds_bos and spec.bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f'{spec.bos} $A',
            pair=f'{spec.bos} $A {spec.bos} $B',
            special_tokens=[(spec.bos, tokenizer.token_to_id(spec.bos))],
        )
    roles = {'bos_token': spec.bos, 'eos_token': spec.eos, 'pad_token': spec.pad, 'unk_token': spec.unk}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=2048,
        extra_special_tokens=dict(spec.named),
        chat_template=spec.chat_template,
        **{role: token for role, token in roles.items() if token is not None},
    )
