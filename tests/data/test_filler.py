"""A batch without images gets a blank one that changes nothing."""

import pytest
import torch

from vlmtune.data import Collator, Processor
from vlmtune.data.filler import image_filler
from vlmtune.data.sample_loading import to_tensors
from vlmtune.engine.flops import ModelFlops
from vlmtune.models import SupervisedFinetune
from vlmtune.structures import IGNORE_INDEX, Conversation, Message, TextPart

# All of them pack.
FAMILIES = ['llava', 'qwen2_5_vl', 'internvl', 'smolvlm', 'llava_next', 'llava_onevision', 'gemma3', 'paligemma']


def sample(processor, words):
    talk = Conversation((Message('user', (TextPart(words),)), Message('assistant', (TextPart('four and five'),))))
    return to_tensors(processor.tokenize(talk), {}, processor=processor, supervised=True)


@pytest.fixture(scope='module', params=FAMILIES)
def family(request, tiny_model):
    path = str(tiny_model(request.param, amplify=2.0))
    template = 'vicuna' if request.param.startswith('llava') else None
    return SupervisedFinetune(path, tune=dict(llm='full'), dtype='float32'), Processor(path, prompt_template=template)


@pytest.mark.parametrize('pack', [True, False], ids=['packed', 'padded'])
def test_the_loss_and_the_counts_are_those_without_it(family, pack):
    model, processor = family
    samples = [sample(processor, 'What is it?'), sample(processor, 'And that there, is it the same?')]
    filler = image_filler(processor)
    plain, filled = (
        Collator(processor.family, pad_token_id=0, pack=pack, filler=added)(samples) for added in (None, filler)
    )
    assert set(filled) - set(plain) == {
        'filler_tokens',
        *(name for name in filler if 'pixel' in name or 'image' in name),
    }
    assert {'pixel_values', 'pixel_bytes'} & set(filled)
    assert filled['input_ids'].numel() > plain['input_ids'].numel()
    counts = [ModelFlops(model).rows(batch) for batch in (plain, filled)]
    assert [list(map(torch.Tensor.tolist, (c.samples, c.images))) for c in counts] == [
        [[len(s['input_ids']) for s in samples], []]
    ] * 2
    assert counts[0][:3] == counts[1][:3]
    losses, gradients = [], []
    for batch in (plain, filled):
        model.zero_grad()
        loss = model(**batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.named_trainable().values()]))
    assert losses[0] > 1
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_all_labels_are_ignored_and_it_is_small(family):
    _, processor = family
    filler = image_filler(processor)
    assert (filler['labels'] == IGNORE_INDEX).all()
    assert (filler['input_ids'] == processor.image_token_id).any()
    assert len(filler['input_ids']) < 80


def test_a_batch_with_an_image_stays_as_it_is(family):
    _, processor = family
    with_image = {**image_filler(processor), 'labels': image_filler(processor)['input_ids']}
    collate = [
        Collator(processor.family, pad_token_id=0, pack=False, filler=f) for f in (None, image_filler(processor))
    ]
    plain, filled = (c([sample(processor, 'Hm.'), with_image]) for c in collate)
    assert plain.keys() == filled.keys()
    assert all(torch.equal(plain[name], filled[name]) for name in plain)
