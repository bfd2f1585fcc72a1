"""Pictures inside the page; thumbnails are made once of each file, all together no larger than a page may be."""

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vlmtune.data.images import load_image
from vlmtune.structures import ImageRef
from vlmtune.utils.errors import DataError

SIDE = 320  # pixels, the longest side of a thumbnail
_QUALITY = 80


def data_uri(picture: Image.Image) -> str:
    """The picture as a JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, 'JPEG', quality=_QUALITY)
    return 'data:image/jpeg;base64,' + base64.b64encode(buffer.getvalue()).decode('ascii')


class Pictures:
    """Makes thumbnails until the budget is spent.

    Args:
        folders: where relative paths may lie, tried in turn; the working directory comes last.
        budget: bytes of all thumbnails together, as they stand in the page.
    """

    def __init__(self, folders: Sequence[str], *, budget: int) -> None:
        self.folders: list[str | None] = [*folders, None]
        self.left = budget
        self._made: dict[str, str] = {}

    def name(self, path: str) -> str:
        """A path without the folder that all of them share."""
        for folder in self.folders:
            inside = Path(os.path.abspath(folder or '.'))
            if Path(path).is_relative_to(inside):
                return str(Path(path).relative_to(inside))
        return path

    def source(self, path: str) -> str:
        """A data URI.

        Raises:
            DataError: the image is not there, cannot be decoded, or there is no room left for it.
        """
        if path not in self._made:
            self._made[path] = self._make(path)
        uri = self._made[path]
        if len(uri) > self.left:
            raise DataError('left out: the page has grown to its limit')
        self.left -= len(uri)
        return uri

    def _make(self, path: str) -> str:
        if path.startswith('<'):
            raise DataError('the picture lies inside its row')
        troubles = []
        for folder in self.folders:
            try:
                picture = load_image(ImageRef(path=path), root=folder)
            except DataError as error:
                troubles.append(error)
                continue
            picture.thumbnail((SIDE, SIDE))
            return data_uri(picture)
        raise troubles[0]
