import pytest
import torch
from PIL import Image
from transformers import TextStreamer

from vlmtune.data import Collator, Processor
from vlmtune.data.images import load_image
from vlmtune.evaluation import generate, stop_tokens
from vlmtune.evaluation.generation import answering, encode_prompt, prompt_inputs
from vlmtune.models import SupervisedFinetune, load_model
from vlmtune.ops import mrope_positions
from vlmtune.structures import Conversation, ImagePart, ImageRef, Message, TextPart
from vlmtune.utils.errors import ConfigError, DataError

TEXTS = [
    'Hello?',
    'What colour is the square in this picture, and why?',
    'And now?',
    'Why is it so, and what comes next?',
]


def ask(text, *images):
    parts = [ImagePart(i) for i in range(len(images))]
    return Conversation((Message('user', (*parts, TextPart(text))),), tuple(ImageRef(path=str(i)) for i in images))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    for name, size, colour in (('a.png', (60, 40), 'red'), ('b.png', (40, 90), 'blue')):
        Image.new('RGB', size, colour).save(folder / name)
    return [folder / 'a.png', folder / 'b.png']


def load(tiny_model, family, **options):
    path = str(tiny_model(family, amplify=4.0))
    return load_model(path, dtype=torch.float32, **options)[0], Processor(path)


FAMILIES = [
    *('llama', 'llava', 'qwen2_vl', 'qwen2_5_vl', 'qwen3_vl', 'internvl', 'smolvlm'),
    *('llava_next', 'llava_onevision', 'gemma3', 'paligemma', 'qwen3_5'),
]


@pytest.mark.parametrize('family', FAMILIES)
def test_answers_in_batches_equal_answers_one_by_one(tiny_model, images, family):
    model, processor = load(tiny_model, family)
    if family == 'paligemma':  # it scales embeddings up: what the last token says would drown all others
        model.get_input_embeddings().weight.data /= 32
    shown = [(), (images[0],), tuple(images), ()] if processor.family.has_vision else [()] * 4
    conversations = [ask(text, *files) for text, files in zip(TEXTS, shown, strict=True)]
    alone = generate(model, processor, conversations, max_new_tokens=8)
    assert len(set(alone)) > 2  # the model does hear the question
    for batch_size in (2, 4):
        assert generate(model, processor, conversations, batch_size=batch_size, max_new_tokens=8) == alone


@pytest.mark.parametrize('family', FAMILIES)
def test_the_first_token_is_what_training_would_make_likeliest(tiny_model, images, family):
    """The model sees an answer's prompt as it saw it in training: the same attention, the same images."""
    path = str(tiny_model(family, amplify=4.0))
    model, processor = SupervisedFinetune(path, tune=dict(llm='full'), dtype='float32').eval(), Processor(path)
    question = ask(TEXTS[1], *(images if processor.family.has_vision else ()))
    sample = encode_prompt(processor, question)
    ids = torch.from_numpy(sample.input_ids).long()
    pictures = processor.image_inputs([load_image(image) for image in sample.images])
    batch = dict(input_ids=ids, labels=torch.full_like(ids, -100), position_ids=positions(processor, ids, pictures))
    batch |= processor.token_types(ids, batch['labels'])
    collate = Collator(processor.family, pad_token_id=0, pack=False)
    with torch.no_grad():
        logits = model.model(**model.model_inputs(collate([{**batch, **pictures}])), use_cache=False).logits[0, -1]
    assert new_tokens(model.model, processor, question, max_new_tokens=1) == [int(logits.argmax())]


def positions(processor, ids, pictures):
    text = torch.arange(len(ids))
    if processor.family.positions == 'rope':
        return text
    grid, merge = pictures['image_grid_thw'], processor.image_processor.merge_size
    axes = mrope_positions(ids, image_token_id=processor.image_token_id, image_grid_thw=grid, merge_size=merge)
    return torch.cat([text[None], axes])


def test_prompts_are_padded_on_the_left(tiny_model, images):
    _, processor = load(tiny_model, 'qwen2_5_vl')
    samples = [encode_prompt(processor, ask('Hello?')), encode_prompt(processor, ask('Hello?', images[0]))]
    inputs = prompt_inputs(processor, samples)
    short = len(samples[0])
    assert inputs['attention_mask'].sum(1).tolist() == [short, len(samples[1])]
    assert inputs['input_ids'][0, -short:].tolist() == samples[0].input_ids.tolist()
    assert inputs['attention_mask'][0, -short:].all()
    image_tokens = inputs['input_ids'] == processor.image_token_id
    assert image_tokens.sum() > 0
    assert torch.equal(inputs['mm_token_type_ids'], image_tokens.long())


def new_tokens(model, processor, conversation, **settings):
    """The tokens of one greedy answer, as the streamer sees them."""

    class Ids(TextStreamer):
        def __init__(self):
            super().__init__(processor.tokenizer)
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            pass

    streamer = Ids()
    generate(model, processor, [conversation], streamer=streamer, **settings)
    return streamer.ids[len(encode_prompt(processor, conversation)) :]


def test_an_answer_ends_with_the_stop_token_of_model_or_template(tiny_model):
    model, processor = load(tiny_model, 'llama')
    free = new_tokens(model, processor, ask(TEXTS[1]), max_new_tokens=8)
    third = next(i for i in range(2, 8) if free[i] not in free[:i])
    model.generation_config.eos_token_id = free[third]
    assert new_tokens(model, processor, ask(TEXTS[1]), max_new_tokens=8) == free[: third + 1]


def test_stop_tokens_are_the_models_the_tokenizers_and_the_templates(tiny_model):
    chatml = Processor(str(tiny_model('llama')), prompt_template='chatml', special_tokens=('<|im_end|>',))
    end, eos = chatml.tokenizer.convert_tokens_to_ids('<|im_end|>'), chatml.tokenizer.eos_token_id
    assert set(stop_tokens(chatml, 7)) == {7, end, eos}
    endless = Processor(str(tiny_model('llava')))  # LLaVA's own template writes nothing after an answer
    with pytest.raises(DataError):
        endless.stop_token_ids(7)
    assert set(stop_tokens(endless, [7])) == {7, endless.tokenizer.eos_token_id}


def test_every_module_is_left_in_the_mode_it_was_in(tiny_model):
    model, processor = load(tiny_model, 'llama')
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    generate(model, processor, [ask('Hello?')], max_new_tokens=2)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(DataError):
        generate(model, processor, [ask('Hello?', 'nowhere.png')], max_new_tokens=2)
    with answering(model):
        assert not any(module.training for module in model.modules())
    with pytest.raises(ValueError, match='max_new_tokens'):  # the model itself fails
        generate(model, processor, [ask('Hello?')], max_new_tokens=-1)
    assert [module.training for module in model.modules()] == before


def test_greedy_answers_draw_nothing_and_follow_no_sampling_settings_of_the_checkpoint(tiny_model, capfd):
    model, processor = load(tiny_model, 'llama')
    want = generate(model, processor, [ask(TEXTS[1])], max_new_tokens=8)
    model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.9, top_k=3)
    before = torch.get_rng_state()
    capfd.readouterr()
    assert generate(model, processor, [ask(TEXTS[1])], max_new_tokens=8) == want
    assert torch.equal(torch.get_rng_state(), before)
    assert 'temperature' not in capfd.readouterr().err


def test_sampling_follows_the_seed(tiny_model):
    model, processor = load(tiny_model, 'llama')
    sampling = dict(do_sample=True, temperature=5.0, top_p=1.0, top_k=0, max_new_tokens=8)
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers += generate(model, processor, [ask(TEXTS[1])], **sampling)
    assert answers[0] == answers[1] != answers[2]


def test_mixed_weights_answer_under_autocast(tiny_model, images):
    path = str(tiny_model('llava', amplify=4.0))
    model = SupervisedFinetune(path, tune=dict(projector='full'), dtype='bfloat16')
    settings = dict(autocast_dtype=model.dtype, max_new_tokens=4)
    plain, processor = load_model(path, dtype=torch.bfloat16)[0], Processor(path)
    question = [ask(TEXTS[1], images[0])]
    assert model.model.model.multi_modal_projector.linear_1.weight.dtype is torch.float32
    assert generate(model.model, processor, question, **settings) == generate(plain, processor, question, **settings)
    with pytest.raises(RuntimeError, match='dtype'):
        generate(model.model, processor, question, max_new_tokens=4)


def test_a_quantised_model_trains_and_dequantises_as_before_once_it_has_answered(tiny_model):
    """On a CPU with AVX512-BF16, bitsandbytes' evaluation mode would rewrite the 4-bit weights for good."""
    path = str(tiny_model('llama'))
    model = SupervisedFinetune(path, tune=dict(llm='lora'), quantization='nf4', dtype='float32').train()
    ids = torch.arange(5, 25)[None]

    def gradients():
        model.zero_grad()
        model(ids, input_ids=ids).backward()
        return {name: p.grad.clone() for name, p in model.named_trainable().items()}

    before = gradients()
    generate(model.model, Processor(path), [ask('Hello?')], max_new_tokens=2)
    after = gradients()
    assert max(gradient.abs().max() for gradient in before.values()) > 0
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_only_single_answers_are_streamed(tiny_model):
    model, processor = load(tiny_model, 'llama')
    with pytest.raises(ConfigError, match='batch_size is 2'):
        generate(model, processor, [ask('a'), ask('b')], batch_size=2, streamer=TextStreamer(processor.tokenizer))


def test_no_question_no_answer(tiny_model):
    model, processor = load(tiny_model, 'llama')
    assert generate(model, processor, []) == []
