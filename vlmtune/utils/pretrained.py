"""Loading from a folder or a hub, with failures that a user understands."""

import os
from typing import Any

from vlmtune.utils.errors import ModelError


def load_pretrained(auto_class: Any, name_or_path: str, **kwargs: Any) -> Any:
    """``auto_class.from_pretrained(name_or_path)``; remote code is never run.

    Raises:
        ModelError: the folder or hub id cannot be read.
    """
    path = os.path.expanduser(name_or_path)
    looks_local = path.startswith(('/', './', '../')) or path.count('/') != 1
    if not os.path.isdir(path) and looks_local:
        raise ModelError(
            f'no model at {os.path.abspath(path)}; expected a folder with config.json, or a hub id such as org/name'
        )
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, 'config.json')):
        raise ModelError(f'{os.path.abspath(path)} has no config.json; expected a Hugging Face model folder')
    try:
        return auto_class.from_pretrained(path, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, ImportError) as error:  # ImportError: a package that a setting asks for
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f'cannot load {name_or_path} with {auto_class.__name__}: {reason}') from error
