"""Makes the goldens of tokenizer.model files: small SentencePiece models, and how SentencePiece itself cuts texts.

It takes an environment with sentencepiece 0.2.3 and transformers 4.44.2, whose slow ``LlamaTokenizer`` puts added
tokens around SentencePiece in its old and its new way.
"""

import io
import json
import random
from pathlib import Path

import sentencepiece
import torch
import transformers
from safetensors.torch import save_file
from transformers import AddedToken, LlamaTokenizer

HERE = Path(__file__).parent
SEED = 3
WORDS = (
    'the quick brown fox jumps over a lazy dog what colour is the square aaaa aaab ababab banana hello world'.split()
)
HAN = '书生浦语是一个大语言模型请描述这张图片中有什么今天天气很好我们去吃火锅吧这道菜的主要食材是牛肉和土豆'
LETTERS = 'abcxyzABC  ▁.,;:()\n\t0123456789书生浦语模型牛肉火锅é😀Ωß\x00\u200b\u3000ﬁ½'
SYMBOLS = ['[UNUSED_TOKEN_3]', '<ab>', '<ab>c', '[X]', '<ctl>', '<s>', '</s>', '<unk>', '<0x41>', '<image>', '</image>']
FIXED = ['', ' ', '  ', '\n', '<s>', '</s>', '<unk>', '<0x0A>', 'a', '▁', '▁▁a', ' a ', 'x[UNUSED_TOKEN_3]y', ' [X] ',
         'a<ab>c<ab>', '<ctl>', '[X][X]', '|im_start|>user\n']  # fmt: skip
PLAIN = dict(normalization_rule_name='identity', remove_extra_whitespaces=False, byte_fallback=True)
MODELS = {
    'llama': dict(PLAIN, allow_whitespace_only_pieces=True),
    'internlm2': dict(
        PLAIN, add_dummy_prefix=False, split_by_whitespace=False,
        user_defined_symbols=[f'[UNUSED_TOKEN_{i}]' for i in range(6)],
    ),
    'symbols': dict(PLAIN, user_defined_symbols=['<ab>', '[X]', '<ab>c'], control_symbols=['<ctl>']),
    'no_bytes': dict(PLAIN, byte_fallback=False),
    'normalised': dict(normalization_rule_name='nmt_nfkc', byte_fallback=True),
}  # fmt: skip
ADDED = ['<image>', '</image>']


def corpus() -> list[str]:
    """Lines with words, Chinese, code and repeats."""
    rng, lines = random.Random(SEED), []
    for _ in range(2000):
        line = ' '.join(rng.choice(WORDS) for _ in range(rng.randint(3, 12)))
        at = rng.randrange(len(HAN) - 8)
        line += HAN[at : at + rng.randint(0, 8)]
        line += rng.choice(
            ['', '', '  x = foo(1, 23);\tif (a == b) { return 12.5; }', 'a' * rng.randint(1, 9) + 'abab']
        )
        lines.append(line)
    return lines


def texts(lines: list[str]) -> list[str]:
    """Pieces of the corpus, random letters, repeats, and symbols within all of it."""
    rng, made = random.Random(SEED), list(FIXED)
    for _ in range(700):
        line = rng.choice(lines)
        at = rng.randrange(len(line))
        made.append(line[at : at + rng.randint(1, 40)])
    made += [''.join(rng.choice(LETTERS) for _ in range(rng.randint(1, 20))) for _ in range(700)]
    made += [''.join(rng.choice('ab a') for _ in range(rng.randint(1, 24))) for _ in range(300)]
    for _ in range(500):
        parts = [''.join(rng.choice(LETTERS) for _ in range(rng.randint(0, 6))) for _ in range(rng.randint(2, 4))]
        made.append(''.join(part + rng.choice(SYMBOLS) for part in parts) + rng.choice(['', 'a', ' end']))
    return made


def flat(rows: list[list[int]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Lists of numbers as two tensors."""
    joined = [number for row in rows for number in row]
    return {'values': torch.tensor(joined, dtype=dtype), 'lengths': torch.tensor([*map(len, rows)], dtype=torch.int16)}


def main() -> None:
    """Write sentencepiece.safetensors and .json beside this file."""
    lines = corpus()
    samples = texts(lines)
    tables = {'texts': flat([list(text.encode()) for text in samples], torch.uint8)}
    tensors = {}
    for name, settings in MODELS.items():
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, model_type='bpe', vocab_size=600, character_coverage=0.995,
            split_digits=True, num_threads=1, minloglevel=2, **settings,
        )  # fmt: skip
        file = HERE / f'{name}.model'
        file.write_bytes(out.getvalue())
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        tables[f'{name}/pieces'] = flat([pieces.encode(text) for text in samples], torch.int16)
        for legacy in (True, False) if name == 'llama' else ():
            slow = LlamaTokenizer(str(file), legacy=legacy, add_bos_token=False)
            slow.add_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED])
            ids = [slow(text)['input_ids'] for text in samples]
            tables[f'{name}/{"legacy" if legacy else "new"}'] = flat(ids, torch.int16)
        tensors[f'{name}/model'] = torch.frombuffer(bytearray(out.getvalue()), dtype=torch.uint8)
        file.unlink()
    tensors |= {f'{name}/{part}': tensor for name, table in tables.items() for part, tensor in table.items()}
    save_file(tensors, HERE / 'sentencepiece.safetensors')
    versions = dict(sentencepiece=sentencepiece.__version__, transformers=transformers.__version__)
    note = dict(
        repository='https://github.com/google/sentencepiece', versions=versions, seed=SEED, models=MODELS, added=ADDED,
        how='make_sentencepiece.py: <model>/pieces is what SentencePiece makes of the texts; llama/legacy and '
            'llama/new are the slow LlamaTokenizer around it, with legacy=True and False and two added tokens',
    )  # fmt: skip
    (HERE / 'sentencepiece.json').write_text(json.dumps(note, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
