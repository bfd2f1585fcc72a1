"""Images of allowed hosts are downloaded once, while planning; other URLs are refused."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from vlmtune.apps.data.file_checks import check_files
from vlmtune.data import SupervisedDataset, chat_template_map_fn, downloads, llava_map_fn, load_rows
from vlmtune.data.downloads import image_root
from vlmtune.structures import ImageSize
from vlmtune.utils.errors import ConfigError, DataError


def png(width=60, height=90):
    buffer = io.BytesIO()
    Image.new('RGB', (width, height), 'red').save(buffer, 'PNG')
    return buffer.getvalue()


@pytest.fixture
def server():
    """A web server; ``asked`` lists the paths that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith('/to/'):
                self.send_response(302)
                self.send_header('Location', f'http://{self.path.removeprefix("/to/")}')
                self.end_headers()
            elif body := {'/a.png': png(), '/page.html': b'<html>', '/large.png': png(300, 300) + bytes(9000)}.get(
                self.path
            ):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)
            else:
                self.send_error(404)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as found:
        found.asked, found.host = asked, f'127.0.0.1:{found.server_port}'
        thread = threading.Thread(target=found.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def build(processor, server, tmp_path):
    """``build(url, url, ...)``: a data set with a row for each, of which a broken one is left out."""

    def run(*urls, **settings):
        path = tmp_path / 'train.jsonl'
        turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'A square.'}]
        path.write_text(''.join(json.dumps({'image': url, 'conversations': turns}) + '\n' for url in urls))
        defaults = dict(
            url_hosts=(server.host,),
            cache_dir=str(tmp_path / 'cache' / 'plans'),
            on_bad_sample='skip',
            bad_sample_budget=1.0,
            planning_workers=0,
        )
        return SupervisedDataset(
            rows=dict(type=load_rows, path=str(path)),
            processor=processor('llava', prompt_template='vicuna'),
            dataset_map_fn=dict(type=llava_map_fn),
            template_map_fn=dict(type=chat_template_map_fn),
            **{**defaults, **settings},
        )

    return run


@pytest.mark.parametrize('with_folder', [False, True])
def test_an_image_of_an_allowed_host_is_downloaded_once(with_folder, build, server, tmp_path):
    url = f'http://{server.host}/a.png'
    (tmp_path / 'pictures').mkdir()
    folder = dict(image_folder=str(tmp_path / 'pictures')) if with_folder else {}
    for _ in range(2):
        dataset = build(url, url, **folder)
        assert dataset[0]['pixel_bytes'].shape == dataset[1]['pixel_bytes'].shape
        assert dataset.samples[0].images[0].path == url
        assert dataset.samples[0].image_sizes == (ImageSize(90, 60),)
    build(url, max_length=1024, **folder)  # another plan
    assert server.asked == ['/a.png']
    assert [file.read_bytes() for file in (tmp_path / 'cache' / 'images').iterdir()] == [png()]


def test_a_file_that_went_is_fetched_again(build, server, tmp_path):
    url = f'http://{server.host}/a.png'
    dataset = build(url, on_bad_sample='error')
    next((tmp_path / 'cache' / 'images').iterdir()).unlink()
    with pytest.raises(DataError, match=rf'image not found: {url} \(downloaded to /'):
        dataset[0]
    build(url)[0]
    assert server.asked == ['/a.png', '/a.png']


BAD = {
    'missing.png': ('missing_image', r'cannot be downloaded: http://\S+/missing.png \(HTTP Error 404'),
    'page.html': ('broken_image', r'http://\S+/page.html: not an image file'),
    'large.png': ('oversized_image', 'large.png has more than 9,000 bytes; scale it down'),
    'to/localhost:1/a.png': ('refused_image', 'is redirected to http://localhost:1/a.png, whose host is not in'),
}


@pytest.mark.parametrize('path', BAD)
def test_what_cannot_be_had_is_a_bad_row(path, build, server, monkeypatch, tmp_path):
    monkeypatch.setattr(downloads, 'MAX_BYTES', 9000)
    kind, message = BAD[path]
    good, bad = f'http://{server.host}/a.png', f'http://{server.host}/{path}'
    dataset = build(good, bad)
    assert len(dataset) == 1
    assert [(b.index, b.error, b.images) for b in dataset.bad_samples] == [(1, kind, (bad,))]
    with pytest.raises(DataError, match=message):
        raise DataError(dataset.bad_samples[0].reason)
    assert len(list((tmp_path / 'cache' / 'images').iterdir())) == 1


def test_a_redirect_to_an_allowed_host_is_followed(build, server):
    assert len(build(f'http://{server.host}/to/{server.host}/a.png')) == 1


def test_a_server_that_is_not_there(build, server):
    dataset = build(f'http://{server.host}/a.png', 'http://127.0.0.1:1/a.png', url_hosts=(server.host, '127.0.0.1:1'))
    assert [bad.error for bad in dataset.bad_samples] == ['missing_image']


@pytest.mark.parametrize('url', ['http://{0}.evil.org/a.png', 'http://me@{0}/a.png', 'ftp://{0}/a.png', 'http://[/a'])
def test_other_urls_are_refused_unasked(url, build, server):
    with pytest.raises(DataError, match=r'sample 0 .*image is a URL \(.*\); download it first') as error:
        build(url.format(server.host), on_bad_sample='error')
    assert error.value.kind == 'refused_image'
    assert not server.asked


def test_a_host_that_is_allowed_later_makes_a_new_plan(build, server, caplog):
    good, other = f'http://{server.host}/a.png', 'http://127.0.0.1:1/a.png'
    refused = build(good, other).bad_samples
    assert "or allow its host with url_hosts=('images.example.org',)" in refused[0].reason
    assert [bad.error for bad in build(good, other, url_hosts=(server.host, '127.0.0.1:1')).bad_samples] == [
        'missing_image'
    ]


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(cache_dir=None), 'url_hosts: .*set plan_cache_dir'),
        (dict(url_hosts='x.org'), "url_hosts='x.org': expected names of hosts"),
        (dict(url_hosts=('https://x.org',)), 'expected names of hosts'),
    ],
)
def test_settings(settings, message, build):
    with pytest.raises(ConfigError, match=message):
        build('a.png', **settings)


def test_check_data_agrees(build, server, tmp_path):
    urls = [f'http://{server.host}/{path}' for path in ('a.png', 'missing.png')] + ['http://x.org/a.png']
    dataset = build(*urls)
    root = image_root(None, url_hosts=(server.host,), cache_dir=str(tmp_path / 'other' / 'plans'))
    report = check_files(dataset.rows, llava_map_fn, image_folder=root, workers=0)
    assert [(problem.index, problem.kind) for problem in report.problems] == [
        (1, 'missing_image'),
        (2, 'refused_image'),
    ]
    assert [bad.error for bad in dataset.bad_samples] == [problem.kind for problem in report.problems]
