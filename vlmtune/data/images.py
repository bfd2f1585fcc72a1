"""Images: where a path may lead, sizes from headers, pixels in RGB.

Sizes are read from headers alone, so that planning decodes nothing. ``read_image_size`` and ``load_image`` look at an
image in the same way, so the size that was planned is the size that is loaded.
"""

import errno
import functools
import hashlib
import io
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

import numpy as np
from PIL import ExifTags, Image

from vlmtune.data.image_refs import shorten
from vlmtune.structures import ImageRef, ImageSize
from vlmtune.utils.errors import DataError

MAX_PIXELS = 144_000_000
"""Images of more pixels are refused before they are decoded. Pillow itself refuses more than 178,956,970."""

# A fixed list: some of Pillow's other readers start programs (EPS) or give an image several sizes (ICO).
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF', 'BMP', 'PPM', 'AVIF', 'JPEG2000', 'HEIF')
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's readers raise on broken files (they document no base class).
_DECODE_ERRORS = (
    SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, struct.error, zlib.error,
    AttributeError,
)  # fmt: skip
_BAD_PATH_ERRNOS = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL,
}  # fmt: skip


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


# ---- where a path may lead


@dataclass(frozen=True)
class ImageRoot:
    """Where images lie if some of them come from URLs.

    Attributes:
        folder: the image folder of all others; None as in ``resolve_image_path``.
        hosts: ``images.example.org`` or ``images.example.org:8080``; other hosts' images are refused.
        downloads: holds the file of every URL that was downloaded.
    """

    folder: Path | None
    hosts: tuple[str, ...]
    downloads: Path

    def allows(self, url: str) -> bool:
        """Whether the host of a URL is one of ``hosts``: letter by letter, so a URL with a login is not."""
        try:
            parts = urlsplit(url)
        except ValueError:
            return False
        return parts.scheme in ('http', 'https') and parts.netloc.lower() in self.hosts

    def file_of(self, url: str) -> Path:
        """The file of a URL, whether it is there or not."""
        return self.downloads / hashlib.sha256(url.encode('utf-8', 'surrogatepass')).hexdigest()


Root: TypeAlias = str | Path | ImageRoot | None


def is_url(path: str | None) -> bool:
    """Whether an image is on the web."""
    return path is not None and re.match('https?://', path, re.IGNORECASE) is not None


def locate(path: str, root: Root) -> tuple[str, str | Path | None]:
    """A path, and the folder in which it must lie, if any; of an allowed URL, the file that it is downloaded to.

    Raises:
        DataError: a URL of a host that is not allowed.
    """
    if not is_url(path):
        return path, root.folder if isinstance(root, ImageRoot) else root
    if isinstance(root, ImageRoot) and root.allows(path):
        return str(root.file_of(path)), None
    raise DataError(
        f'image is a URL ({shorten(path)}); download it first and give its path, '
        "or allow its host with url_hosts=('images.example.org',)",
        kind='refused_image',
    )


@functools.lru_cache(maxsize=16)
def _real_root(absolute_root: str) -> Path:
    return Path(absolute_root).resolve()


def resolve_image_path(ref: ImageRef, root: Root) -> Path:
    """The file of a reference: absolute, links resolved.

    Args:
        ref: a reference that holds a path.
        root: the image folder. Relative paths start there, and every path must end inside it, also after its links are
            resolved. None: relative paths start at the working directory and any file may be named.

    Raises:
        DataError: the path leaves the image folder, is not a path, or is a URL of a host that is not allowed.
    """
    if ref.path is None:
        raise ValueError(f'{ref} holds bytes, not a path')
    place, inside = locate(ref.path, root)
    try:
        if inside is None:
            return Path(place).resolve()
        folder = _real_root(os.path.abspath(inside))
        path = (folder / place).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        message = f'image path cannot be used: {shorten(repr(ref.path))} ({_reason(error)})'
        raise DataError(message, kind='refused_image') from error
    if not path.is_relative_to(folder):
        raise DataError(
            f'image outside the image folder: {shorten(ref.path)} leads to {shorten(str(path))}; '
            f'expected a file inside image_folder {folder}',
            kind='refused_image',
        )
    return path


# ---- sizes and pixels


def read_image_size(ref: ImageRef, *, root: Root = None) -> ImageSize:
    """Height and width as ``load_image`` gives them, from the header; no pixel is decoded.

    Args:
        ref: a path or bytes.
        root: the image folder, see ``resolve_image_path``.

    Raises:
        DataError: not found, outside the image folder, not an image, or too large.
    """
    with _open(ref, root=root) as image:
        width, height = image.size
        return ImageSize(width, height) if _orientation(image) >= 5 else ImageSize(height, width)


def load_image(ref: ImageRef, *, root: Root = None) -> Image.Image:
    """The image in RGB, upright, decoded once.

    EXIF orientation is applied; transparency is put on white; 16-bit grey is scaled to 8 bit; of an animation the
    first frame is taken. The result carries no metadata.

    Args:
        ref: a path or bytes.
        root: the image folder, see ``resolve_image_path``.

    Raises:
        DataError: not found, outside the image folder, not an image, broken, too large, or of a pixel type without a
            defined range (floating point).
    """
    with _open(ref, root=root) as image:
        orientation = _orientation(image)
        image.load()
        pixels = _to_rgb(image, name=str(ref))
        if orientation in _TRANSPOSE:
            pixels = pixels.transpose(_TRANSPOSE[orientation])
        pixels.info = {}  # EXIF and the like: nobody may turn the image a second time
        return pixels


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextmanager
def _open(ref: ImageRef, *, root: Root) -> Iterator[Image.Image]:
    """The opened, not yet decoded image; every way in which it may be broken becomes a DataError that names it."""
    path = None if ref.data is not None else resolve_image_path(ref, root)
    name = f'{ref} (downloaded to {path})' if is_url(ref.path) else str(path or ref)
    try:
        with Image.open(path or io.BytesIO(ref.data or b''), formats=_known_formats()) as image:
            _check_header(image, name=name)
            yield image
    except Image.UnidentifiedImageError as error:
        message = f'not an image file: {name}; expected {", ".join(_known_formats())}'
        raise DataError(message, kind='broken_image') from error
    except FileNotFoundError as error:
        inside = None if ref.path is None else locate(ref.path, root)[1]
        folder = ' (image_folder is not set)' if inside is None else f' (image_folder is {os.fspath(inside)!r})'
        message = f'image not found: {shorten(name, 300)}{folder}; fix the row, or image_folder'
        raise DataError(message, kind='missing_image') from error
    except OSError as error:
        if error.errno is not None and error.errno not in _BAD_PATH_ERRNOS:
            raise  # the machine's trouble (a full disk, too many open files), not the row's
        message = f'image cannot be read: {shorten(name, 300)} ({_reason(error)})'
        raise DataError(message, kind='broken_image') from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f'image too large: {name} ({error}); scale it down', kind='oversized_image') from error
    except _DECODE_ERRORS as error:
        message = f'image cannot be read: {name} ({type(error).__name__}: {error})'
        raise DataError(message, kind='broken_image') from error


def _check_header(image: Image.Image, *, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f'image of {width} x {height} pixels: {name}', kind='broken_image')
    if image.mode == 'F':
        message = f'image of floating-point pixels: {name}; their range is not defined, save it with 8 or 16 bit'
        raise DataError(message, kind='broken_image')
    if width * height > MAX_PIXELS:
        raise DataError(
            f'image too large: {name} has {width} x {height} = {width * height:,} pixels; '
            f'expected at most {MAX_PIXELS:,}, scale it down',
            kind='oversized_image',
        )


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none, if it is broken, or if Pillow applies it itself."""
    if image.format == 'TIFF':
        return 1
    try:
        # Not image.getexif(): for PNG files that decodes all pixels to look behind them.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except (OSError, *_DECODE_ERRORS):
        return 1
    return value if value in range(1, 9) else 1


def _to_rgb(image: Image.Image, *, name: str) -> Image.Image:
    """A new RGB image of the same size, from any mode."""
    if image.mode.startswith('I'):
        return _from_16_bit(image, name=name)
    if image.has_transparency_data:
        layer = image.convert('RGBA')
        white = Image.new('RGBA', layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert('RGB')
    return image.convert('RGB')


def _from_16_bit(image: Image.Image, *, name: str) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(
            f'image of values {values.min()} to {values.max()}: {name}; expected 0 to 65535, save it with 8 or 16 bit',
            kind='broken_image',
        )
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert('RGB')
