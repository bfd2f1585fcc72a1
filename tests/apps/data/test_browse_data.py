"""browse-data: one harmless file that shows what the model gets."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.apps.report.pages import Page
from vlmtune.apps.data.browse_data import browse_data
from vlmtune.cli import main
from vlmtune.config import load_config
from vlmtune.engine.build import build_data
from vlmtune.testing import write_broken_data
from vlmtune.utils.errors import ConfigError

CONFIG = """
from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, load_rows, {map_fn}
from vlmtune.engine import TrainLoop

processor = dict(type=Processor, pretrained_model_name_or_path={model!r})
dataset = dict(type=SupervisedDataset, rows=dict(type=load_rows, path={data!r}), dataset_map_fn=dict({function}),
               template_map_fn=dict(type=chat_template_map_fn), image_folder={images!r}, max_length={max_length})
train_dataloader = dict(dataset=dataset, pack_to_max_length=True)
train_cfg = dict(type=TrainLoop, max_epochs=1)
randomness = dict(seed=3)
"""


@pytest.fixture
def write_config(tmp_path, tiny_model):
    def write(data_path, image_folder, map_fn='llava_map_fn', max_length=128, **options):
        path = tmp_path / 'mine.py'
        function = ', '.join([f'type={map_fn}', *(f'{name}={value!r}' for name, value in options.items())])
        values = dict(model=str(tiny_model('qwen2_5_vl')), data=str(data_path), images=str(image_folder))
        path.write_text(CONFIG.format(map_fn=map_fn, function=function, max_length=max_length, **values))
        return str(path)

    return write


def browse(config, *arguments):
    out = Path(config).with_name('page.html')
    assert main(['browse-data', config, '--out', str(out), *arguments]) == 0
    text = out.read_text(encoding='utf-8')
    return Page(text), text


def test_the_page_shows_samples_as_the_model_gets_them(tiny_data, write_config):
    data = tiny_data('llava', rows=8)
    config = write_config(data.data_path, data.image_folder)
    page, _ = browse(config)
    dataset = build_data(load_config(config))[1].dataset
    articles = page.all('article')
    assert len(articles) == 8
    for index, (sample, (_, attributes, text)) in enumerate(zip(dataset.samples, articles, strict=True)):
        assert attributes['id'] == f'sample-{index}'
        learned = int((sample.labels[1:] != -100).sum())
        assert f'{len(sample)} tokens, {learned} learned, {sample.patches} vision patches' in text
        assert f'sample {index}, data.json[{index}]' in text
        for ref, size in zip(sample.images, sample.image_sizes, strict=True):
            assert f'{ref}, {size.width} x {size.height} pixels' in text
    counts = [int(re.match(r'(\d+) image tokens', text)[1]) for _, _, text in page.all('span', 'image')[1:]]
    token = dataset.processor.image_token_id
    assert sum(counts) == sum(int((sample.input_ids == token).sum()) for sample in dataset.samples)
    answers = {m['value'] for row in json.loads(data.data_path.read_text()) for m in row['conversations'][1::2]}
    assert answers | {'<|im_end|>', 'learned'} == {text for _, _, text in page.all('span', 'learned')}


def test_nothing_is_fetched_and_nothing_runs(tiny_data, write_config):
    data = tiny_data('llava', rows=8)
    page, text = browse(write_config(data.data_path, data.image_folder))
    sources = [attributes['src'] for _, attributes, _ in page.all('img')]
    assert len(sources) == 8
    for source in sources:
        head, _, content = source.partition(',')
        assert head == 'data:image/jpeg;base64'
        picture = Image.open(io.BytesIO(base64.b64decode(content)))
        picture.load()
        assert max(picture.size) <= 400
    assert not page.all('script') + page.all('iframe')
    assert [attributes['href'] for _, attributes, _ in page.all('link')] == ['data:,']
    assert 'http' not in re.sub('http-equiv', '', text)
    assert "default-src 'none'" in text


def test_text_of_a_row_stays_text(tmp_path, write_config):
    nasty = '</div><script>alert(1)</script><img src=x onerror=alert(1)> & "quoted" <|im_end|>'
    name = 'a"onload=alert(1)<b>.png'
    (tmp_path / 'images').mkdir()
    Image.new('RGB', (1200, 30), 'red').save(tmp_path / 'images' / name)
    row = {
        'image': name,
        'conversations': [{'from': 'human', 'value': f'<image>{nasty}'}, {'from': 'gpt', 'value': nasty}],
    }
    (tmp_path / 'rows.json').write_text(json.dumps([row]))
    page, _ = browse(write_config(tmp_path / 'rows.json', tmp_path / 'images', max_length=512))
    assert not page.all('script') + page.all('b')
    assert [set(attributes) for _, attributes, _ in page.all('img')] == [{'src', 'alt'}]
    (shown,) = page.all('div', 'text')
    assert shown[2].count(nasty) == 2
    (caption,) = page.all('figcaption')
    assert caption[2] == f'{name}, 1200 x 30 pixels'


def test_secrets_of_rows_do_not_leave(tmp_path, write_config):
    secret = 'hf_' + 'a1B2' * 8
    turns = [{'from': 'human', 'value': '<image>'}, {'from': 'gpt', 'value': secret}]
    Image.new('RGB', (64, 64)).save(tmp_path / f'{secret}.png')
    (tmp_path / 'rows.json').write_text(json.dumps([{'image': f'{secret}.png', 'conversations': turns}]))
    _, text = browse(write_config(tmp_path / 'rows.json', tmp_path))
    assert secret not in text


def test_a_scaled_picture_keeps_its_shape(tmp_path, write_config):
    Image.new('RGB', (1000, 500), 'red').save(tmp_path / 'wide.png')
    row = {'image': 'wide.png', 'conversations': [{'from': 'human', 'value': '<image>'}, {'from': 'gpt', 'value': 'x'}]}
    (tmp_path / 'rows.json').write_text(json.dumps([row]))
    page, _ = browse(write_config(tmp_path / 'rows.json', tmp_path))
    ((_, attributes, _),) = page.all('img')
    assert Image.open(io.BytesIO(base64.b64decode(attributes['src'].partition(',')[2]))).size == (400, 200)


def test_boxes_are_drawn_where_they_are(tmp_path, write_config):
    """A box of the left half of a white image: its outline is coloured, the middle of the right half is not."""
    Image.new('RGB', (200, 100), 'white').save(tmp_path / 'a.png')
    row = {
        'image': 'a.png',
        'conversations': [{'from': 'human', 'value': '<image>Where?'}, {'from': 'gpt', 'value': 'at <bbox>'}],
        'objects': {'bbox': [[0, 0, 100, 100]]},
    }
    (tmp_path / 'rows.json').write_text(json.dumps([row]))
    page, _ = browse(write_config(tmp_path / 'rows.json', tmp_path, boxes='pixel'))
    ((_, attributes, _),) = page.all('img')
    picture = Image.open(io.BytesIO(base64.b64decode(attributes['src'].partition(',')[2])))
    assert min(picture.getpixel((99, 50))) < 128
    assert min(picture.getpixel((1, 50))) < 128
    assert min(picture.getpixel((150, 50))) > 200
    assert page.all('figcaption')[0][2] == 'a.png, 200 x 100 pixels, boxes: 1'


def test_packs_show_where_samples_begin_and_end(tiny_data, write_config):
    data = tiny_data('llava', rows=24)
    config = write_config(data.data_path, data.image_folder)
    page, _ = browse(config)
    _, loader = build_data(load_config(config))
    packs, lengths = loader.batch_sampler.plan[:5], loader.dataset.lengths
    bars = page.all('div', 'pack')
    assert len(bars) == 5
    spans = [e for e in page.all('span') if 'title' in e[1]]
    assert [int(text) for _, _, text in spans] == [index for pack in packs for index in pack]
    for _, attributes, text in spans:
        width = float(re.search(r'flex: 0 0 ([\d.]+)%', attributes['style'])[1])
        assert width == pytest.approx(100 * lengths[int(text)] / 128, abs=0.001)  # printed with three decimals


def test_samples_are_chosen_by_the_seed_or_named(tiny_data, write_config):
    data = tiny_data('llava', rows=24)
    config = write_config(data.data_path, data.image_folder)

    def shown(*arguments):
        return [
            int(attributes['id'].removeprefix('sample-'))
            for _, attributes, _ in browse(config, *arguments)[0].all('article')
        ]

    chosen = shown('-n', '5')
    assert len(chosen) == 5
    assert chosen == sorted(set(chosen)) == shown('-n', '5')
    assert chosen != shown('-n', '5', '--cfg-options', 'randomness.seed=4')
    assert shown('--indices', '7', '2') == [7, 2]
    with pytest.raises(ConfigError, match='--indices 24: there are 24 usable samples, 0 to 23'):
        browse_data(config, out='page.html', indices=[24])


def test_the_terminal_gets_the_same(tiny_data, write_config, capsys):
    data = tiny_data('llava', rows=4)
    config = write_config(data.data_path, data.image_folder)
    capsys.readouterr()
    assert main(['browse-data', config, '--text', '--indices', '0']) == 0
    out = capsys.readouterr().out
    assert '\033' not in out
    row = json.loads(data.data_path.read_text())[0]
    assert f'⟦{row["conversations"][1]["value"]}⟧' in out
    assert re.search(r'<\|vision_start\|>\[\d+ image tokens\]<\|vision_end\|>', out)
    assert '== pack 0: ' in out


def test_broken_rows_do_not_stop_it_and_broken_pixels_are_told(tmp_path, write_config):
    broken = write_broken_data(tmp_path / 'data')
    config = write_config(broken.data_path, broken.image_folder, map_fn='openai_map_fn')
    page, _ = browse(config, '-n', '99')
    troubles = [text for _, _, text in page.all('p', 'trouble')]
    assert len(troubles) == len(broken.cut) + len(broken.bad_pixels)
    assert all('image cannot be read' in text for text in troubles)


def test_a_page_that_cannot_be_written_is_one_line(tiny_data, write_config, capsys):
    data = tiny_data('llava', rows=4)
    assert main(['browse-data', write_config(data.data_path, data.image_folder), '--out', '/nowhere/p.html']) == 1
    assert 'error: --out /nowhere/p.html: cannot be written' in capsys.readouterr().err
