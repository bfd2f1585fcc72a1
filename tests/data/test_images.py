"""Image paths, sizes and pixels, on files that Pillow writes."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from vlmtune.data.images import load_image, read_image_size, resolve_image_path
from vlmtune.structures import ImageRef, ImageSize
from vlmtune.utils.errors import DataError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image, fmt='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def photo(height=20, width=30):
    """A picture in which no turn or flip goes unseen."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    pixels[..., 1] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    return Image.fromarray(pixels)


def with_orientation(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


PNG = encode(photo())


# ---- paths


@pytest.fixture
def root(tmp_path):
    """An image folder with one image, a neighbour outside of it, and links to both."""
    folder = tmp_path / 'images'
    (folder / 'sub').mkdir(parents=True)
    (folder / 'sub' / 'a.png').write_bytes(PNG)
    (tmp_path / 'secret.png').write_bytes(PNG)
    (tmp_path / 'images_too').mkdir()
    (folder / 'inside.png').symlink_to(folder / 'sub' / 'a.png')
    (folder / 'outside.png').symlink_to(tmp_path / 'secret.png')
    (tmp_path / 'linked').symlink_to(folder)
    return folder


@pytest.mark.parametrize(
    'path', ['sub/a.png', './sub/../sub/a.png', 'inside.png', '{root}/sub/a.png', '{linked}/sub/a.png']
)
@pytest.mark.parametrize('folder', ['images', 'linked'])
def test_paths_inside_the_folder(root, path, folder):
    path = path.format(root=root, linked=root.parent / 'linked')
    assert resolve_image_path(ImageRef(path), root.parent / folder) == root.resolve() / 'sub' / 'a.png'


@pytest.mark.parametrize(
    'path', ['../secret.png', 'outside.png', '{root}/../secret.png', '/etc/passwd', '../images_too/x']
)
def test_paths_outside_the_folder(root, path):
    for read in (read_image_size, load_image):
        with pytest.raises(DataError, match='image outside the image folder'):
            read(ImageRef(path.format(root=root)), root=root)


def test_without_a_folder_paths_start_at_the_working_directory(root, monkeypatch):
    monkeypatch.chdir(root)
    assert read_image_size(ImageRef('sub/a.png')) == ImageSize(20, 30)
    assert read_image_size(ImageRef(str(root.parent / 'secret.png'))) == ImageSize(20, 30)


def test_a_relative_folder_follows_the_working_directory(tmp_path, monkeypatch):
    for height in (20, 40):
        place = tmp_path / str(height)
        (place / 'images').mkdir(parents=True)
        photo(height, 30).save(place / 'images' / 'a.png')
        monkeypatch.chdir(place)
        assert read_image_size(ImageRef('a.png'), root='images') == ImageSize(height, 30)


@pytest.mark.parametrize('path', ['nowhere/b.png', 'sub/a.png/x'])
def test_a_missing_image_names_its_full_path_and_the_setting(root, path):
    with pytest.raises(DataError) as error:
        read_image_size(ImageRef(path), root=root)
    assert str(root.resolve() / path) in str(error.value)
    if path == 'nowhere/b.png':
        assert 'image not found' in str(error.value)
        assert f"(image_folder is '{root}')" in str(error.value)


@pytest.mark.parametrize('path', ['sub', 'x' * 5000, 'a\0b', '.'])
def test_odd_paths(root, path):
    with pytest.raises(DataError) as error:
        load_image(ImageRef(path), root=root)
    assert len(str(error.value)) < 1000


# ---- sizes and pixels


@pytest.mark.parametrize('fmt', ['PNG', 'JPEG', 'WEBP', 'GIF', 'TIFF', 'BMP', 'PPM'])
def test_every_format(tmp_path, fmt):
    path = tmp_path / f'a.{fmt.lower()}'
    photo(20, 30).save(path)
    ref = ImageRef(path.name)
    assert read_image_size(ref, root=tmp_path) == ImageSize(20, 30)
    image = load_image(ref, root=tmp_path)
    assert (image.mode, image.size) == ('RGB', (30, 20))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(photo())).mean() < 8


@pytest.mark.parametrize('fmt', ['PNG', 'JPEG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(fmt, orientation):
    upright = photo(20, 30)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that a camera's reading undoes
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    ref = ImageRef(data=encode(stored, fmt, exif=with_orientation(orientation)))
    assert read_image_size(ref) == ImageSize(20, 30)
    image = load_image(ref)
    assert image.size == (30, 20)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).mean() < 4
    assert image.getexif().get(274) is None, 'a second reader would turn it again'


def test_a_broken_orientation_is_ignored():
    profile = PngInfo()
    profile.add_text('Raw profile type exif', '\n\n\nno hexadecimal digits')
    files = [encode(photo(20, 30), pnginfo=profile)]
    files += [encode(photo(20, 30), 'JPEG', exif=e) for e in (b'Exif\0\0garbage', with_orientation(99).tobytes())]
    for ref in map(ImageRef, [None] * 3, files):
        assert read_image_size(ref) == ImageSize(20, 30)
        assert load_image(ref).size == (30, 20)


@pytest.mark.parametrize('fmt', ['PNG', 'JPEG', 'WEBP', 'GIF', 'TIFF'])
def test_the_size_comes_from_the_header_alone(monkeypatch, fmt):
    def load(self):
        raise AssertionError('decoded')

    data = encode(photo(400, 300), fmt)
    monkeypatch.setattr(ImageFile.ImageFile, 'load', load)
    assert read_image_size(ImageRef(data=data)) == ImageSize(400, 300)
    if fmt in ('PNG', 'JPEG'):
        assert read_image_size(ImageRef(data=data[: len(data) // 4])) == ImageSize(400, 300)


def test_16_bit_grey_is_scaled():
    values = np.array([[0, 128, 32768, 65535]], np.uint16)
    for fmt in ('PNG', 'TIFF'):
        image = load_image(ImageRef(data=encode(Image.fromarray(values), fmt)))
        assert np.asarray(image)[0].tolist() == [[v] * 3 for v in (0, 0, 128, 255)]


def test_32_bit_values_that_fit_16_bit_are_scaled_and_others_refused():
    fits = Image.fromarray(np.array([[0, 65535]], np.int32))
    assert np.asarray(load_image(ImageRef(data=encode(fits, 'TIFF'))))[0, 1].tolist() == [255] * 3
    for odd in (np.array([[0, 70000]], np.int32), np.array([[-1, 5]], np.int32)):
        with pytest.raises(DataError, match='expected 0 to 65535'):
            load_image(ImageRef(data=encode(Image.fromarray(odd), 'TIFF')))
    with pytest.raises(DataError, match='floating-point'):
        load_image(ImageRef(data=encode(Image.fromarray(np.array([[0.5]], np.float32)), 'TIFF')))


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'PA'])
def test_transparency_is_put_on_white(mode):
    if mode == 'P':
        image = Image.new('P', (2, 1))
        image.putpalette([*RED, 0, 255, 0])
        image.putpixel((1, 0), 1)
        data = encode(image, transparency=1)
    else:
        image = Image.new('RGBA', (2, 1), (*RED, 255))
        image.putpixel((1, 0), (0, 255, 0, 0))
        data = encode(image.convert('LA') if mode == 'LA' else image, 'PNG' if mode != 'PA' else 'GIF')
    loaded = load_image(ImageRef(data=data))
    assert loaded.getpixel((1, 0)) == WHITE
    assert loaded.getpixel((0, 0)) == (RED if mode != 'LA' else (76, 76, 76))


def test_half_transparent_is_mixed_with_white():
    image = load_image(ImageRef(data=encode(Image.new('RGBA', (1, 1), (0, 0, 0, 128)))))
    assert image.getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize(
    ('mode', 'fmt'), [('1', 'PNG'), ('L', 'PNG'), ('P', 'PNG'), ('CMYK', 'JPEG'), ('CMYK', 'TIFF')]
)
def test_modes_become_rgb(mode, fmt):
    image = load_image(ImageRef(data=encode(Image.new('RGB', (3, 2), WHITE).convert(mode), fmt)))
    assert image.mode == 'RGB'
    assert min(np.asarray(image).ravel()) >= 250


@pytest.mark.parametrize('fmt', ['GIF', 'WEBP', 'PNG', 'TIFF'])
def test_the_first_frame_of_an_animation(fmt):
    frames = [Image.new('RGB', (4, 3), color) for color in (RED, WHITE)]
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(load_image(ImageRef(data=data))).astype(int) - RED).max() < 8


def huge_png(width, height):
    def chunk(kind, body):
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('read', [read_image_size, load_image])
@pytest.mark.parametrize(
    ('width', 'message'), [(12_001, 'expected at most 144,000,000'), (60_000, 'decompression bomb')]
)
def test_too_many_pixels_are_refused_before_decoding(read, width, message):
    with pytest.raises(DataError, match=message):
        read(ImageRef(data=huge_png(width, 12_000)))


@pytest.mark.parametrize('fmt', ['PNG', 'JPEG', 'WEBP', 'GIF', 'TIFF'])
@pytest.mark.parametrize('share', [0.5, 0.9])
def test_a_truncated_file_is_named(tmp_path, fmt, share):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, fmt)
    path = tmp_path / 'cut.img'
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=str(path)):
        load_image(ImageRef('cut.img'), root=tmp_path)


@pytest.mark.parametrize(
    'data', [b'', b'not an image at all', b'<svg xmlns="http://www.w3.org/2000/svg"/>', b'%!PS-Adobe-3.0 EPSF-3.0\n']
)
def test_what_is_no_image_is_named(tmp_path, data):
    (tmp_path / 'x.png').write_bytes(data)
    for read in (read_image_size, load_image):
        with pytest.raises(DataError, match=f'not an image file: {tmp_path / "x.png"}; expected JPEG, PNG'):
            read(ImageRef('x.png'), root=tmp_path)


def test_an_eps_file_is_never_handed_to_ghostscript(tmp_path):
    Image.new('RGB', (4, 4)).save(tmp_path / 'x.eps')
    with pytest.raises(DataError, match='not an image file'):
        load_image(ImageRef('x.eps'), root=tmp_path)


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_broken_bytes_never_escape_as_another_error():
    rng = np.random.default_rng(1)
    files = [encode(photo(), fmt, exif=with_orientation(6)) for fmt in ('PNG', 'JPEG', 'WEBP', 'TIFF')]
    refused = 0
    for data in files * 50:
        broken = bytearray(data)
        for at in rng.integers(0, len(data), 4):
            broken[at] = rng.integers(0, 256)
        for read in (read_image_size, load_image):
            try:
                read(ImageRef(data=bytes(broken)))
            except DataError:
                refused += 1
    assert refused > 20


def test_the_machine_s_own_trouble_is_not_the_row_s(tmp_path, monkeypatch):
    def no_files_left(*args, **kwargs):
        raise OSError(24, 'Too many open files')

    monkeypatch.setattr(Image, 'open', no_files_left)
    with pytest.raises(OSError, match='Too many open files'):
        load_image(ImageRef('x.png'), root=tmp_path)
