"""Ports that servers listen on."""

import errno
import socket

from vlmtune.utils.errors import ConfigError

_TROUBLE = {
    errno.EADDRINUSE: 'is in use; end what listens there, or choose another with --port',
    errno.EACCES: 'may not be opened by this user; choose one above 1023 with --port',
    errno.EADDRNOTAVAIL: 'is no address of this machine; give one that is with --host',
}


def listen(host: str, port: int) -> socket.socket:
    """A socket on which nothing else listens; port 0 takes any that is free. Close it, and it was only a question.

    Raises:
        ConfigError: there is no such address, or the port cannot be had.
    """
    place = f'[{host}]:{port}' if ':' in host else f'{host}:{port}'
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        trouble = _TROUBLE.get(error.errno or 0, f'cannot be listened on ({error.strerror}); choose others')
        raise ConfigError(f'{place} {trouble}') from error
