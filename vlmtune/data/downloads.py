"""Images on the web: downloaded once, while planning, and local files from then on."""

import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO
from urllib.request import HTTPRedirectHandler, Request, build_opener

from vlmtune.data.image_refs import shorten
from vlmtune.data.images import ImageRoot, Root, is_url, locate, read_image_size
from vlmtune.structures import ImageRef
from vlmtune.utils.errors import ConfigError, DataError

MAX_BYTES = 64 * 2**20
"""Larger files are refused."""
TIMEOUT = 30.0
"""Seconds that a server may be silent."""


def image_root(
    image_folder: str | os.PathLike[str] | None, *, url_hosts: Sequence[str] = (), cache_dir: str | None = None
) -> Path | ImageRoot | None:
    """Where the images of a data set lie.

    Args:
        image_folder: of the recipe.
        url_hosts: hosts whose images are downloaded.
        cache_dir: of plans; downloads are kept in the folder ``images`` beside it.

    Raises:
        ConfigError: ``url_hosts`` is no list of names, or there is no place for downloads.
        DataError: the image folder does not exist.
    """
    folder = None if image_folder is None else Path(image_folder).expanduser()
    if folder is not None and not folder.is_dir():
        raise DataError(f'image_folder {folder.absolute()} does not exist')
    if not url_hosts:
        return folder
    if isinstance(url_hosts, str) or any(set('/@*') & set(host) for host in url_hosts):
        raise ConfigError(
            f'url_hosts={url_hosts!r}: expected names of hosts, with port where it is not the usual one: '
            "url_hosts=('images.example.org', 'localhost:8080')"
        )
    if cache_dir is None:
        raise ConfigError('url_hosts: images are downloaded to a folder beside plan_cache_dir; set plan_cache_dir')
    hosts = tuple(sorted({host.lower() for host in url_hosts}))
    return ImageRoot(folder, hosts, Path(cache_dir).expanduser().absolute().parent / 'images')


def download(path: str, root: Root) -> None:
    """Fetch the image of a URL, if it is not there yet; nothing is done for other paths.

    Raises:
        DataError: its host is not allowed, it cannot be had, it is too large, or no image.
        ConfigError: it cannot be stored.
    """
    if not is_url(path) or not isinstance(root, ImageRoot):
        return
    file = Path(locate(path, root)[0])
    if file.exists():
        return
    data = _get(path, root)
    try:
        read_image_size(ImageRef(data=data))
    except DataError as error:
        raise DataError(f'{shorten(path)}: {error}', kind=error.kind) from error
    new = file.with_name(f'{file.name}.{uuid.uuid4().hex}')  # other processes may fetch the same image
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(data)
        os.replace(new, file)
    except OSError as error:
        raise ConfigError(f'images cannot be stored in {file.parent} ({error.strerror}); set plan_cache_dir') from error
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


class _Redirects(HTTPRedirectHandler):
    """Follows redirects to allowed hosts only."""

    def __init__(self, root: ImageRoot) -> None:
        self.root = root

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """The next request; names as in the base class."""
        if not self.root.allows(newurl):
            raise DataError(
                f'image {shorten(req.full_url)} is redirected to {shorten(newurl)}, whose host is not in url_hosts',
                kind='refused_image',
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _get(url: str, root: ImageRoot) -> bytes:
    try:
        request = Request(url, headers={'User-Agent': 'vlmtune'})
        with build_opener(_Redirects(root)).open(request, timeout=TIMEOUT) as answer:
            data = answer.read(MAX_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:
        raise DataError(f'image cannot be downloaded: {shorten(url)} ({error})', kind='missing_image') from error
    if len(data) > MAX_BYTES:
        message = f'image too large: {shorten(url)} has more than {MAX_BYTES:,} bytes; scale it down'
        raise DataError(message, kind='oversized_image')
    return data
