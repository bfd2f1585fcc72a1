"""What a row may hold as an image."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from vlmtune.data.image_refs import to_image_ref
from vlmtune.data.images import load_image, read_image_size
from vlmtune.structures import ImageRef, ImageSize
from vlmtune.utils.errors import DataError


def photo(height=20, width=30):
    pixels = np.arange(height * width * 3, dtype=np.uint32).astype(np.uint8).reshape(height, width, 3)
    return Image.fromarray(pixels)


def encode(image, fmt='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


PNG = encode(photo())


@pytest.mark.parametrize(
    ('value', 'ref'),
    [
        ('a/b.png', ImageRef('a/b.png')),
        ('/9j/a.jpg', ImageRef('/9j/a.jpg')),
        (ImageRef('x'), ImageRef('x')),
        (PNG, ImageRef(data=PNG)),
        (memoryview(PNG), ImageRef(data=PNG)),
        ({'bytes': PNG, 'path': 'x.png'}, ImageRef(data=PNG)),
        ({'bytes': None, 'path': 'x.png'}, ImageRef('x.png')),
        ({'path': 'x.png'}, ImageRef('x.png')),
        (base64.b64encode(PNG).decode(), ImageRef(data=PNG)),
        (base64.encodebytes(PNG).decode(), ImageRef(data=PNG)),
        ('data:image/png;base64,' + base64.b64encode(PNG).decode(), ImageRef(data=PNG)),
        ('DATA:image/png;base64,' + base64.encodebytes(PNG).decode(), ImageRef(data=PNG)),
    ],
)
def test_what_a_row_may_hold(value, ref):
    assert to_image_ref(value) == ref


def test_a_path_object(tmp_path):
    assert to_image_ref(tmp_path / 'x.png') == ImageRef(str(tmp_path / 'x.png'))


@pytest.mark.parametrize('fmt', ['PNG', 'JPEG', 'GIF', 'WEBP', 'TIFF'])
def test_base64_of_every_format_is_told_from_a_path(fmt):
    data = encode(photo(), fmt)
    assert to_image_ref(base64.b64encode(data).decode()) == ImageRef(data=data)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I', 'F'])
def test_a_pil_image_keeps_its_values(mode):
    image = photo().convert('L').convert(mode) if mode.startswith('I') else photo().convert(mode)
    again = Image.open(io.BytesIO(to_image_ref(image).data))
    assert again.mode.startswith(mode[0])
    assert np.array_equal(np.asarray(again), np.asarray(image))


def test_a_pil_image_with_exif_is_stored_upright():
    exif = Image.Exif()
    exif[274] = 6
    image = Image.open(io.BytesIO(encode(photo(20, 30), exif=exif)))
    ref = to_image_ref(image)
    assert read_image_size(ref) == ImageSize(30, 20)
    assert load_image(ref).size == (20, 30)


@pytest.mark.parametrize('url', ['http://x.org/a.png', 'HTTPS://x.org/' + 'a' * 500])
def test_a_url_is_refused_when_it_is_opened(url, tmp_path):
    for read in (read_image_size, load_image):
        with pytest.raises(DataError, match=r'image is a URL \(.*\); download it first') as error:
            read(to_image_ref(url), root=tmp_path)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        ('s3://bucket/a.png', r'image is a URL \(s3://bucket/a.png\); download it first'),
        ('s3://bucket/' + 'a' * 500, r'download it first'),
        ('', 'empty image path'),
        (' ', 'empty image path'),
        (b'', '0 bytes'),
        ('data:image/png;base64,%%%', 'broken base64'),
        ('data:image/png;base64,', 'without content'),
        ('data:image/png,abc', 'expected data:image/...;base64'),
        ({'url': 'a'}, r"keys \['url'\] holds neither bytes nor path"),
        ({'bytes': None, 'path': None}, 'neither bytes nor path'),
        (3, 'image of type int'),
        (None, 'image of type NoneType'),
        (photo().convert('HSV'), 'mode HSV cannot be stored'),
    ],
)
def test_what_a_row_may_not_hold(value, message):
    with pytest.raises(DataError, match=message) as error:
        to_image_ref(value)
    assert len(str(error.value)) < 300
