"""References to images: everything that a row may hold as an image becomes a path or bytes."""

import base64
import binascii
import io
import os
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps

from vlmtune.structures import ImageRef
from vlmtune.utils.errors import DataError

_BASE64_MAGIC = (b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff', b'GIF8', b'RIFF', b'II*\x00', b'MM\x00*')
_PNG_MODES = {'1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'}


def shorten(text: str, limit: int = 120) -> str:
    """The text, cut to what fits an error message."""
    return text if len(text) <= limit else f'{text[:limit]}... ({len(text)} characters)'


def to_image_ref(value: Any) -> ImageRef:
    """A reference to the image that a row holds.

    Args:
        value: a path; the bytes of an image file; base64 text of a PNG, JPEG, GIF, WebP or TIFF file; a base64 data
            URI; ``dict(bytes=..., path=...)`` as image columns of Hugging Face datasets have (bytes are preferred); a
            PIL image, which is encoded again without loss; or an ImageRef.

    Raises:
        DataError: any other value, an empty one, or a URL that is not http. Whether one that is may be used is for
            the data set to say, see ``images.locate``.
    """
    if isinstance(value, ImageRef):
        return value
    if isinstance(value, str | os.PathLike):
        return _ref_from_text(os.fspath(value))
    if isinstance(value, bytes | bytearray | memoryview):
        if not (data := bytes(value)):
            raise DataError('image of 0 bytes; expected the content of an image file')
        return ImageRef(data=data)
    if isinstance(value, Image.Image):
        return ImageRef(data=_encode_losslessly(value))
    if isinstance(value, Mapping):
        for key in ('bytes', 'path'):
            if value.get(key) is not None:
                return to_image_ref(value[key])
        raise DataError(
            f'image dict with keys {sorted(map(str, value))} holds neither bytes nor path; expected one of them'
        )
    raise DataError(f'image of type {type(value).__name__}; expected a path, bytes, base64 or dict(bytes=, path=)')


def _ref_from_text(text: str | bytes) -> ImageRef:
    if not isinstance(text, str):
        text = os.fsdecode(text)
    if not text.strip():
        raise DataError('empty image path; leave the image out, or name a file')
    if text[:5].lower() == 'data:':
        return ImageRef(data=_decode_data_uri(text))
    if re.match('(?!https?://)[a-z][a-z0-9+.-]*://', text, re.IGNORECASE):
        raise DataError(f'image is a URL ({shorten(text)}); download it first and give its path', kind='refused_image')
    if (data := _decode_plain_base64(text)) is not None:
        return ImageRef(data=data)
    return ImageRef(path=text)


def _decode_data_uri(text: str) -> bytes:
    head, comma, payload = text.partition(',')
    if not comma or not head.lower().endswith(';base64'):
        raise DataError(f'data URI starts with {shorten(head, 60)!r}; expected data:image/...;base64,...')
    try:
        data = base64.b64decode(''.join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f'data URI with broken base64: {error}') from error
    if not data:
        raise DataError('data URI without content; expected a base64 image file')
    return data


def _decode_plain_base64(text: str) -> bytes | None:
    """The bytes if the text is base64 of an image file: it must decode and begin as image files do, so no path does."""
    if len(text) < 64:
        return None
    try:
        if not base64.b64decode(text[:16], validate=True).startswith(_BASE64_MAGIC):
            return None
        return base64.b64decode(''.join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _encode_losslessly(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    upright = ImageOps.exif_transpose(image)
    if upright.mode in _PNG_MODES:
        upright.save(buffer, 'PNG', compress_level=1)
    else:
        try:
            upright.save(buffer, 'TIFF')
        except OSError as error:
            raise DataError(f'PIL image of mode {upright.mode} cannot be stored; convert it to RGB first') from error
    return buffer.getvalue()
