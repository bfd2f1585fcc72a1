"""``vlmtune demo``: a page on which one talks with a model about pictures."""

import logging
import socket

import fastapi
import uvicorn

from vlmtune.apps.demo.examples import Examples, read_example_folder
from vlmtune.apps.demo.page import DemoPage, build_demo
from vlmtune.apps.demo.settings import gr
from vlmtune.apps.demo.voices import Voice, load_voices
from vlmtune.utils.errors import ConfigError
from vlmtune.utils.ports import listen

__all__ = ['Examples', 'Voice', 'build_demo', 'demo', 'load_voices', 'read_example_folder']

logger = logging.getLogger(__name__)

# Answers have lines and columns; nothing is shared with a hub; thumbnails fill rows of any width; on a phone, where two
# chats stand below each other, both can be seen.
_CSS = """
.message .md { white-space: pre-wrap; }
.icon-button-wrapper:has([aria-label="Share"]) { display: none; }
#examples .grid-wrap { height: auto; min-height: 0; max-height: 50vh; }
#examples .grid-container { grid-template-columns: repeat(auto-fill, minmax(80px, 1fr)); height: auto; }
@media (max-width: 680px) { #chat-0, #chat-1 { height: 40vh !important; } }
"""
_MAX_UPLOAD = '64mb'
# The browser itself refuses to fetch anything from elsewhere, whatever an answer or a library says.
_OWN_FILES_ONLY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def demo(
    model: str,
    *,
    adapter: str | None = None,
    compare: str | None = None,
    examples: str | None = None,
    system: str = '',
    max_new_tokens: int = 512,
    bits: int | None = None,
    host: str = '127.0.0.1',
    port: int = 7860,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        model: a folder or a hub id; the folder of an adapter means its base and the adapter.
        adapter: a PEFT adapter on top of it.
        compare: a model or an adapter whose answers are shown beside, '' for the base of the adapter, which is not
            loaded twice.
        examples: a folder of pictures and questions to click, see ``read_example_folder``.
        system: system message at first.
        max_new_tokens: of an answer, at first.
        bits: 4 or 8 loads quantised.
        host: address to listen on; others than this machine's own let anyone in who reaches it.
        port: 0 takes any that is free.

    Raises:
        UserError: the port cannot be had, the examples or a model cannot be read.
    """
    listener = listen(host, port)  # before models are loaded, which takes a while
    try:
        found = read_example_folder(examples) if examples is not None else Examples()
        page = DemoPage(load_voices(model, adapter=adapter, compare=compare, bits=bits), found)
        server = make_server(page.build(system=system, max_new_tokens=max_new_tokens))
        logger.info('open %s in a browser; Ctrl-C ends it', _address(listener))
        try:
            server.run(sockets=[listener])
            if not server.started:
                raise ConfigError("the server of the page did not start; pip install -U 'vlmtune[demo]'")
        except KeyboardInterrupt:
            logger.info('closed')
        finally:
            page.stop_all()
    finally:
        listener.close()


def make_server(blocks: 'gr.Blocks') -> uvicorn.Server:
    """A server of one page; ``run(sockets=[listen(...)])`` starts it."""
    # Without it Gradio takes the name of any file from a browser; only ``launch`` sets it, which serves by itself.
    blocks.has_launched = True
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        blocks,
        path='/',
        theme=gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace']),
        css=_CSS,
        footer_links=[],
        run_history=False,
        max_file_size=_MAX_UPLOAD,
        show_error=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )
    headers = [('Content-Security-Policy', _OWN_FILES_ONLY), ('Referrer-Policy', 'no-referrer')]
    # Pages that are open at the end are cut off, which is no error. Gradio tells of its own.
    return uvicorn.Server(uvicorn.Config(app, log_level='critical', headers=headers, timeout_graceful_shutdown=1))


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ('0.0.0.0', '::'):
        logger.warning('everyone who reaches this machine can use the page and the model')
        host = socket.gethostname()
    return f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'
