"""ZeRO-3 on two ranks: whatever the batches hold, all compute the same layers, and learn what one process learns."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from vlmtune.data import Processor
from vlmtune.evaluation import generate
from vlmtune.models import SupervisedFinetune
from vlmtune.structures import Conversation, ImagePart, ImageRef, Message, TextPart

# Three steps of four micro-batches: images on one rank only, on none, and on the other one only.
KINDS = ['image', 'text', 'text', 'two', *['text'] * 4, 'text', 'image', 'two', 'text']
PARTS = dict(vision_encoder='full', projector='full', llm='lora')
TIED = dict(tie_word_embeddings=True)
SETTINGS = dict(lora_dropout=0.0, max_norm=1e9, lr=0.05, max_steps=3, max_epochs=None, max_length=2000)
SETTINGS |= dict(pack_to_max_length=False, shuffle=False)
SLOW = ['internvl', 'internvl_chat', 'points', 'gemma3', 'idefics3', 'qwen3_vl_moe', 'llava_next', 'llava_onevision']


@pytest.fixture(scope='module')
def rows(tiny_data, tmp_path_factory):
    """Paths of the rows, of the same without images, and of the images."""
    data, folder = tiny_data('llava', rows=33), tmp_path_factory.mktemp('rows')
    names = sorted(path.name for path in data.image_folder.iterdir())
    made = []
    for number, kind in enumerate(KINDS):
        count = dict(text=0, image=1, two=2)[kind]
        question = '<image>\n' * count + f'What is {number}?'
        turns = [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': f'It is {number}.'}]
        made.append({'conversations': turns, **({'image': names[number : number + count]} if count else {})})
    for name, content in (('mixed', made), ('text', [row for row in made if 'image' not in row] * 2)):
        (folder / f'{name}.json').write_text(json.dumps(content))
    return folder / 'mixed.json', folder / 'text.json', data.image_folder


@pytest.fixture(scope='module')
def trained(write_recipe, train_in_ranks, tiny_model, rows, tmp_path_factory):
    """``trained('llava', 2, 'zero3', PARTS)``: recipe and work dir of three steps; made once."""
    known = {}

    def go(family, ranks, deepspeed=None, tune=PARTS, *, recipe=None, model=None, special_tokens=(), **overrides):
        key = repr((family, ranks, deepspeed, tune, recipe, model, special_tokens, overrides))
        if key in known:
            return known[key]
        folder = tmp_path_factory.mktemp(family)
        has_vision = 'vision_encoder' in tune
        template = 'vicuna' if family.startswith('llava') else None
        path = write_recipe(
            folder / 'recipe.py',
            model=tiny_model(family, **(model or {})),
            template=template,
            data=rows[0] if has_vision else rows[1],
            images=rows[2],
            tune=tune,
            optimizer='SGD',
            **(recipe or {}),
        )
        if special_tokens:
            path.write_text(path.read_text() + f"processor['special_tokens'] = {list(special_tokens)}\n")
        settings = {**SETTINGS, 'accumulative_counts': 4 // ranks, **overrides}
        train_in_ranks(ranks, path, work_dir=folder / 'work', deepspeed=deepspeed, overrides=settings)
        known[key] = path, folder / 'work'
        return known[key]

    return go


def weights(run):
    return load_file(run[1] / 'iter_3.pth' / 'model.safetensors')


def numbers(run, *names):
    messages = json.loads((run[1] / 'iter_3.pth' / 'trainer.json').read_text())['messages']
    return {name: messages[f'train/{name}']['values'] for name in names}


def assert_same_training(one, other):
    apart = {name: (tensor - weights(other)[name]).abs().max().item() for name, tensor in weights(one).items()}
    assert max(apart.values()) < 1e-6
    for name, values in numbers(one, 'loss', 'grad_norm').items():
        torch.testing.assert_close(numbers(other, name)[name], values, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    'family', ['qwen2_5_vl', 'minicpmv2', 'smolvlm', *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_images_on_some_ranks_or_none(family, trained):
    """No hang, and what one process learns; also what is counted is the same: fillers are not."""
    one, two = trained(family, 1), trained(family, 2, 'zero3')
    assert_same_training(one, two)
    lines = [
        [json.loads(line) for line in next(run[1].glob('*/metrics.jsonl')).read_text().splitlines()]
        for run in (one, two)
    ]
    for ours, theirs in zip(*lines, strict=True):
        assert ours['samples'] == theirs['samples'] == 4
        rates = [line['learned_tokens_per_second'] / line['tokens_per_second'] for line in (ours, theirs)]
        assert rates[0] == pytest.approx(rates[1], rel=1e-6)


def test_a_head_that_is_the_embeddings_trains_and_grows(trained):
    tune = dict(llm='lora', embeddings='full', lm_head='full')
    options = dict(model=TIED, special_tokens=tuple(f'<|new {n}|>' for n in range(200)))
    one, two = (trained('qwen2', ranks, deepspeed, tune, **options) for ranks, deepspeed in ((1, None), (2, 'zero3')))
    assert_same_training(one, two)
    head = next(tensor for name, tensor in weights(two).items() if 'embed_tokens' in name)
    assert len(head) == len(Processor(str(trained_model(two)), special_tokens=options['special_tokens']).tokenizer)


def trained_model(run):
    return next(line.split("'")[1] for line in run[0].read_text().splitlines() if line.startswith('pretrained_model'))


def test_checkpointing_packing_and_accumulation_together(trained):
    options = {'pack_to_max_length': True, 'max_length': 96, 'model.gradient_checkpointing': True}
    full = dict(vision_encoder='full', projector='full', llm='full')
    assert_same_training(
        trained('qwen2_5_vl', 1, None, full, **options), trained('qwen2_5_vl', 2, 'zero3', full, **options)
    )


# ---- sample answers


@pytest.fixture(scope='module')
def questions(rows):
    picture = str(sorted(rows[2].iterdir())[0])
    return dict(
        questions=['What colour is it?', 'Hello?', 'Which of the two is larger, and why?'],
        pictures=[picture, None, [picture, picture]],
        generation=dict(sequence_bias=[[[2], 0.5]]),  # of the token that ends answers: some end soon
    )


def ask(model, run, questions):
    """What the model answers here, in one process."""
    conversations = []
    for text, shown in zip(questions['questions'], questions['pictures'], strict=True):
        images = [] if shown is None else [shown] if isinstance(shown, str) else shown
        parts = (*(ImagePart(i) for i in range(len(images))), TextPart(text))
        conversations.append(Conversation((Message('user', parts),), tuple(ImageRef(path=path) for path in images)))
    processor = Processor(trained_model(run), prompt_template='vicuna')
    return generate(model.model, processor, conversations, max_new_tokens=4, **questions['generation'])


@pytest.mark.parametrize('deepspeed', [None, pytest.param('zero2', marks=pytest.mark.slow), 'zero3'])
def test_sample_answers_of_two_ranks(deepspeed, trained, questions, contents, differences):
    """They are those of one process with these weights, and training goes on as if nobody had asked."""
    settings = dict(lora_dropout=0.1, model=dict(amplify=3.0))
    plain = trained('llava', 2, deepspeed, **settings)
    asked = trained('llava', 2, deepspeed, **settings, recipe=questions, evaluation_freq=1)
    found = [contents(run[1] / 'iter_3.pth') for run in (plain, asked)]
    assert differences(*found) == []
    answers = [json.loads(line) for line in (asked[1] / 'evaluate_chat.jsonl').read_text().splitlines()]
    assert [row['iteration'] for row in answers] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    model = SupervisedFinetune(trained_model(asked), tune=PARTS, lora=dict(r=4, alpha=8), dtype='float32')
    assert ask(model, asked, questions) == [row['answer'] for row in answers[:3]]
    model.load_trainable(weights(asked))
    assert ask(model, asked, questions) == [row['answer'] for row in answers[-3:]]
    assert len({row['answer'] for row in answers}) > 2


@pytest.mark.slow
@pytest.mark.parametrize('deepspeed', [None, 'zero2', 'zero3'])
def test_answers_that_are_drawn_may_end_sooner_on_one_rank(deepspeed, trained, questions, contents, differences):
    """Dropout has moved the generators of the ranks apart; each draws an answer of its own, none waits for ever."""
    settings = dict(lora_dropout=0.1, model=dict(amplify=3.0))
    drawn = dict(questions, generation=dict(do_sample=True, temperature=3.0, sequence_bias=[[[2], 9.0]]))
    runs = [trained('llava', 2, deepspeed, **settings, **more) for more in ({}, dict(recipe=drawn, evaluation_freq=1))]
    assert differences(*(contents(run[1] / 'iter_3.pth') for run in runs)) == []


# ---- afterwards


def test_converted_it_is_the_model_of_zero2_and_needs_no_deepspeed(trained, tmp_path):
    runs = {name: trained('qwen2_5_vl', 2, name) for name in ('zero2', 'zero3')}
    calls = [
        f'main(["convert", "pth_to_hf", {str(recipe)!r}, {str(work / "iter_3.pth")!r}, {str(tmp_path / name)!r}])'
        for name, (recipe, work) in runs.items()
    ]
    check = "assert not [name for name in sys.modules if name.split('.')[0] == 'deepspeed']"
    program = '\n'.join(['import sys', 'from vlmtune.cli import main', *calls, check])
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    files = {name: sorted(path.name for path in (tmp_path / name).iterdir()) for name in runs}
    assert files['zero2'] == files['zero3']
    zero2, zero3 = (
        {k: v for f in (tmp_path / n).rglob('*.safetensors') for k, v in load_file(f).items()} for n in runs
    )
    assert zero2.keys() == zero3.keys()
    assert len(zero2) > 20
    assert max((zero2[name].float() - zero3[name].float()).abs().max() for name in zero2) < 1e-6
