"""Makes the goldens of InternLM2 with the official code, which lies elsewhere: ``make_internlm2.py CHECKOUT``.

CHECKOUT is a clone of https://github.com/OpenGVLab/InternVL at the commit named below, whose ``internlm2`` folder holds
the model and the tokenizer of the InternLM2 repositories. It takes an environment with transformers 4.44.2,
sentencepiece 0.2.3 and einops. Two tiny models with random weights answer prompts that the official ``build_inputs``
makes with the official slow tokenizer, on a SentencePiece model trained here.
"""

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from safetensors.torch import save_file

COMMIT = '2410d1dbf208f0e799459aff9376e5747dbf41a2'
FOLDER = 'internvl_chat/internvl/model'
HERE = Path(__file__).parent
SEED = 7
PIECES, SPARE = 420, 8
CHAT_TOKENS = ['<|plugin|>', '<|interpreter|>', '<|action_end|>', '<|action_start|>', '<|im_end|>', '<|im_start|>']
CORPUS = [
    'Who are you? I am InternLM, a language model.',
    'Tell me about the city of Shanghai in two sentences.',
    '请介绍一下上海这座城市。上海是一座美丽的城市。',
    '你是谁？我是书生浦语，一个语言模型。',
    'system user assistant\nYou are a helpful assistant.',
    'for i in range(10):\n    print(i ** 2, "done")\n',
]
CASES = {  # system, [(question, answer)], open question
    'english': ('', [], 'Who are you?'),
    'chinese': ('', [], '请介绍一下上海这座城市。'),
    'several_turns': (
        'You are a helpful assistant.',
        [('Who are you?', 'I am InternLM, a language model.'), ('你是谁？', '我是书生浦语。')],
        'Tell me about\n\tShanghai  in two sentences. 😀',
    ),
}
# Much longer than max_position_embeddings: here dynamic positions are others than the plain ones.
CASES['long'] = ('', [], 'for i in range(10):\n    print(i ** 2, "done")\n' * 4)
SHARED = dict(
    architectures=['InternLM2ForCausalLM'],
    auto_map={
        'AutoConfig': 'configuration_internlm2.InternLM2Config',
        'AutoModelForCausalLM': 'modeling_internlm2.InternLM2ForCausalLM',
    },
    model_type='internlm2', hidden_act='silu', hidden_size=48, initializer_range=0.02, intermediate_size=64,
    num_hidden_layers=2, num_attention_heads=6, rms_norm_eps=1e-5, rope_theta=1000000, bos_token_id=1, eos_token_id=2,
    pad_token_id=2, torch_dtype='float32', use_cache=True,
)  # fmt: skip
MODELS = {
    'internlm2': dict(
        max_position_embeddings=64, num_key_value_heads=2, bias=False, tie_word_embeddings=False,
        rope_scaling=dict(type='dynamic', factor=2.0),
    ),
    'internlm2_biased': dict(
        max_position_embeddings=256, num_key_value_heads=6, bias=True, tie_word_embeddings=True,
        rope_scaling=dict(type='linear', factor=4.0),
    ),
}  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOKENIZER_CONFIG = dict(
    tokenizer_class='InternLM2Tokenizer', bos_token='<s>', eos_token='</s>', unk_token='<unk>', pad_token='</s>',
    additional_special_tokens=CHAT_TOKENS[::-1], clean_up_tokenization_spaces=False, model_max_length=10**30,
    chat_template=TEMPLATE,
)  # fmt: skip


def train_pieces() -> bytes:
    """A tokenizer.model whose last pieces are spare ones, which the chat tokens take."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in CORPUS * 4), model_writer=out, model_type='bpe', vocab_size=PIECES,
        user_defined_symbols=[f'[UNUSED_TOKEN_{i}]' for i in range(SPARE)], byte_fallback=True, split_digits=True,
        normalization_rule_name='identity', remove_extra_whitespaces=False, add_dummy_prefix=False,
        character_coverage=0.99, num_threads=1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return out.getvalue()


def amplify(model: torch.nn.Module) -> None:
    """Random weights of a size at which a mistake in one of them shows."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.copy_(1 + noise / 5 if is_norm else noise * 0.15)


def name_pieces(file: str) -> dict[int, str]:
    """{id: token} of what the tokenizer adds: chat tokens stand where the pieces have spare ones."""
    processor = sentencepiece.SentencePieceProcessor(model_file=file)
    spare = [processor.piece_to_id(f'[UNUSED_TOKEN_{i}]') for i in range(len(CHAT_TOKENS))]
    return {0: '<unk>', 1: '<s>', 2: '</s>', **dict(zip(spare, CHAT_TOKENS, strict=True))}


def run(model_class: Any, config: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Weights, token ids and logits."""
    model = model_class(config).eval()
    amplify(model)
    model.tie_weights()
    tensors = {f'weights/{key}': tensor.clone() for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors['weights/output.weight']  # as save_pretrained does
    for case, (system, history, question) in CASES.items():
        ids = model.build_inputs(tokenizer, question, history, system)['input_ids']
        fresh = model_class(config).eval()  # a long prompt changes the positions of later ones
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad():
            logits = fresh(input_ids=ids, use_cache=False).logits
        print(case, tuple(ids.shape), float(logits.std()), float(logits.abs().max()))
        tensors |= {f'inputs/{case}/input_ids': ids, f'logits/{case}': logits.float()}
    return tensors


def main() -> None:
    """Write both pairs of files beside this one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkout', type=Path)
    sys.path.insert(0, str(parser.parse_args().checkout / FOLDER))
    from internlm2.configuration_internlm2 import InternLM2Config
    from internlm2.modeling_internlm2 import InternLM2ForCausalLM
    from internlm2.tokenization_internlm2 import InternLM2Tokenizer

    versions = {module.__name__: module.__version__ for module in (transformers, torch, sentencepiece)}
    pieces = train_pieces()
    with tempfile.TemporaryDirectory() as folder:
        file = f'{folder}/tokenizer.model'
        Path(file).write_bytes(pieces)
        names = name_pieces(file)
        added = {i: transformers.AddedToken(name, special=True, normalized=False) for i, name in names.items()}
        tokenizer = InternLM2Tokenizer(file, added_tokens_decoder=added, additional_special_tokens=CHAT_TOKENS[::-1])
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    decoder = {str(i): dict(content=name, **flags) for i, name in names.items()}
    for name, own in MODELS.items():
        config = dict(SHARED, vocab_size=tokenizer.vocab_size, **own)
        tensors = run(InternLM2ForCausalLM, InternLM2Config(**json.loads(json.dumps(config))), tokenizer)
        tensors['files/tokenizer.model'] = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, HERE / f'{name}.safetensors')
        note = dict(
            repository='https://github.com/OpenGVLab/InternVL', commit=COMMIT,
            file=f'{FOLDER}/internlm2/modeling_internlm2.py', seed=SEED, versions=versions,
            how='make_internlm2.py: the official model in float32 and eager attention, one prompt at a time, on ids '
                'that the official build_inputs makes with the official slow tokenizer',
            config=config, tokenizer_config=dict(TOKENIZER_CONFIG, added_tokens_decoder=decoder),
            cases={case: dict(system=s, history=h, question=q) for case, (s, h, q) in CASES.items()},
        )  # fmt: skip
        (HERE / f'{name}.json').write_text(json.dumps(note, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
