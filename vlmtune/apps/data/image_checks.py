"""Whether an image can be used: its header always, its pixels where the file looks cut off or when asked."""

import os

from vlmtune.data.images import Root, load_image, read_image_size, resolve_image_path
from vlmtune.structures import ImageRef, ImageSize

# What a whole file ends with, by what it begins with. Formats without such an end are known by their header alone.
_ENDS = {b'\xff\xd8\xff': b'\xff\xd9', b'\x89PNG\r\n\x1a\n': b'IEND\xaeB`\x82'}
_READ = max(map(len, (*_ENDS, *_ENDS.values())))  # bytes


def check_image(ref: ImageRef, *, root: Root, decode: bool) -> ImageSize:
    """The size of an image that can be used.

    Args:
        ref: a path or bytes.
        root: the image folder.
        decode: decode every pixel. Without it, only a JPEG or PNG file that does not end as one should is decoded:
            many are whole and carry something behind their end.

    Raises:
        DataError: it is missing, broken, cut off, too large, or outside the image folder.
    """
    size = read_image_size(ref, root=root)
    if decode or not _ends_as_it_should(ref, root):
        load_image(ref, root=root)
    return size


def _ends_as_it_should(ref: ImageRef, root: Root) -> bool:
    if ref.data is not None:
        head, tail = ref.data[:_READ], ref.data[-_READ:]
    else:
        with resolve_image_path(ref, root).open('rb') as file:
            head = file.read(_READ)
            file.seek(-min(_READ, len(head)), os.SEEK_END)
            tail = file.read()
    end = next((end for begin, end in _ENDS.items() if head.startswith(begin)), b'')
    return tail.endswith(end)
