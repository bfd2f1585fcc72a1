"""A hub on this machine: it speaks as much of the Hugging Face hub's HTTP as pulling and pushing a model takes.

Its address goes into HF_ENDPOINT. Repositories are folders, a revision is always ``main``, and large files come by the
LFS protocol in one part. Whoever writes needs the key, or for a large file the signed address that the key has got.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_COMMIT = '0' * 39 + '1'


class FakeHub(ThreadingHTTPServer):
    """The server.

    Args:
        root: repositories lie in ``root/org/name``, large files in ``root/lfs``.
        key: what a request to write has to bring.

    Attributes:
        asked: methods and paths of all requests, in their order.
        private: repositories that are.
    """

    daemon_threads = True

    def __init__(self, root: Path, *, key: str) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.root, self.key = root, key
        self.signature = hashlib.sha256(key.encode()).hexdigest()  # of addresses for large files
        self.asked: list[str] = []
        self.private: set[str] = set()
        (root / 'lfs').mkdir(parents=True, exist_ok=True)

    @property
    def address(self) -> str:
        """``http://127.0.0.1:40001``."""
        return f'http://127.0.0.1:{self.server_port}'

    def constants(self, cache: Path) -> dict[str, Any]:
        """What ``huggingface_hub.constants`` holds in a process that was started with this hub as its HF_ENDPOINT."""
        template = self.address + '/{repo_id}/resolve/{revision}/{filename}'
        return dict(
            ENDPOINT=self.address,
            HUGGINGFACE_CO_URL_TEMPLATE=template,
            HF_HUB_CACHE=str(cache),
            HF_TOKEN_PATH=str(cache / 'no_token'),
            HF_HUB_DISABLE_XET=True,
            HF_HUB_OFFLINE=False,
        )


@contextmanager
def fake_hub(root: Path, *, key: str = 'hf_' + 'k' * 24) -> Iterator[FakeHub]:
    """A hub that answers inside the block."""
    hub = FakeHub(root, key=key)
    thread = threading.Thread(target=hub.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = 'HTTP/1.1'

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is written to the terminal."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition('?')[0].strip('/')
        self.server.asked.append(f'{self.command} /{path}')
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        parts = path.split('/')
        if not self._may():
            self._send(401, dict(error='Invalid credentials in Authorization header'))
        elif parts == ['']:
            self._send(200, {})
        elif parts[0] == 'lfs':
            (self.server.root / 'lfs' / parts[1]).write_bytes(body)
            self._send(200, {})
        elif parts[0] == 'api':
            self._api(parts[1:], body)
        elif path.endswith('.git/info/lfs/objects/batch'):
            self._batch(json.loads(body))
        elif parts[2:3] == ['resolve']:
            self._file(self.server.root.joinpath(*parts[:2], *parts[4:]))
        else:
            self._send(404, dict(error=f'no {path}'))

    def _may(self) -> bool:
        if self.command == 'PUT':
            return self.path.endswith(f'?signature={self.server.signature}')
        return self.command != 'POST' or self.headers.get('Authorization') == f'Bearer {self.server.key}'

    def _api(self, parts: list[str], body: bytes) -> None:
        if parts == ['repos', 'create']:
            self._create(json.loads(body))
            return
        if parts == ['validate-yaml']:  # of the card
            self._send(200, dict(errors=[], warnings=[]))
            return
        name, what = '/'.join(parts[1:3]), parts[3:4]
        folder = self.server.root / name
        if parts[0] != 'models' or not folder.is_dir():
            self._send(404, dict(error='Repository not found'), {'X-Error-Code': 'RepoNotFound'})
        elif what == ['preupload']:
            files = json.loads(body)['files']
            modes = {file['path']: 'lfs' if file['path'].endswith('.safetensors') else 'regular' for file in files}
            self._send(200, dict(files=[dict(path=p, uploadMode=m, shouldIgnore=False) for p, m in modes.items()]))
        elif what == ['commit']:
            self._commit(folder, [json.loads(line) for line in body.splitlines()])
        elif what == ['tree']:
            found = [file for file in sorted(folder.rglob('*')) if file.is_file()]
            self._send(200, [_entry(file, folder) for file in found])
        else:
            siblings = [dict(rfilename=file.relative_to(folder).as_posix()) for file in folder.rglob('*')]
            self._send(200, dict(id=name, sha=_COMMIT, private=name in self.server.private, siblings=siblings))

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f'{wanted["organization"]}/{wanted["name"]}'
        url = dict(url=f'{self.server.address}/{name}')
        if (self.server.root / name).is_dir():
            self._send(409, dict(error='You already created this model repo', **url))
            return
        (self.server.root / name).mkdir(parents=True)
        if wanted.get('private') or wanted.get('visibility') == 'private':
            self.server.private.add(name)
        self._send(200, url)

    def _batch(self, wanted: dict[str, Any]) -> None:
        place, signed = f'{self.server.address}/lfs', f'?signature={self.server.signature}'
        actions = [
            {**thing, 'actions': dict(upload=dict(href=f'{place}/{thing["oid"]}{signed}'))}
            for thing in wanted['objects']
        ]
        self._send(200, dict(transfer='basic', objects=actions), kind='application/vnd.git-lfs+json')

    def _commit(self, folder: Path, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line['key'] == 'header':
                continue
            file = folder / line['value']['path']
            file.parent.mkdir(parents=True, exist_ok=True)
            if line['key'] == 'file':
                file.write_bytes(base64.b64decode(line['value']['content']))
            else:
                file.write_bytes((self.server.root / 'lfs' / line['value']['oid']).read_bytes())
        name = folder.relative_to(self.server.root).as_posix()
        url = f'{self.server.address}/{name}/commit/{_COMMIT}'
        self._send(200, dict(commitUrl=url, commitOid=_COMMIT))

    def _file(self, file: Path) -> None:
        if not file.is_file():
            self._send(404, dict(error='Entry not found'), {'X-Error-Code': 'EntryNotFound'})
            return
        data = file.read_bytes()
        extra = {'ETag': f'"{hashlib.sha256(data).hexdigest()}"', 'X-Repo-Commit': _COMMIT}
        self._send(200, data, extra, kind='application/octet-stream')

    def _send(
        self, code: int, content: Any, headers: dict[str, str] | None = None, *, kind: str = 'application/json'
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        told = {'X-Error-Message': content['error']} if isinstance(content, dict) and 'error' in content else {}
        self.send_response(code)
        everything = {'Content-Type': kind, 'Content-Length': str(len(data)), **told, **(headers or {})}
        for name, value in everything.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)


def _entry(file: Path, folder: Path) -> dict[str, Any]:
    data = file.read_bytes()
    oid = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    return dict(type='file', path=file.relative_to(folder).as_posix(), size=len(data), oid=oid)
