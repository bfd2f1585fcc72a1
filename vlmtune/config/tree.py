"""Dotted keys into a config: ``param_scheduler.1.eta_min``."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlmtune.utils.errors import ConfigError
from vlmtune.utils.suggest import did_you_mean


@dataclass(frozen=True)
class DeepKey:
    """One override below a top-level name."""

    root: str
    keys: tuple[str, ...]
    value: Any

    @classmethod
    def parse(cls, full: str, value: Any) -> 'DeepKey':
        """``'model.lora.r'`` has the root ``model``."""
        root, *keys = full.split('.')
        return cls(root, tuple(keys), value)

    def __str__(self) -> str:
        return '.'.join((self.root, *self.keys))

    def under(self, root: str) -> 'DeepKey':
        """The same key where the root has another name."""
        return replace(self, root=root)

    def apply(self, root: Any) -> Any:
        """Sets the value inside ``root`` and returns ``root``.

        A new key may be added to a dict; everything above it must be there.

        Raises:
            ConfigError: the path does not exist.
        """
        self.check(root)
        here = root
        for key in self.keys[:-1]:
            here = _child(here, key)
        if isinstance(here, list):
            here[int(self.keys[-1])] = self.value
        else:
            here[self.keys[-1]] = self.value
        return root

    def check(self, root: Any) -> None:
        """Whether the path exists in ``root``.

        Raises:
            ConfigError: it does not; names the key and its nearest.
        """
        here, place = root, self.root
        for depth, key in enumerate(self.keys):
            last = depth == len(self.keys) - 1
            if isinstance(here, tuple) and last:
                raise ConfigError(f'{self}: {place} is a tuple; give it as a whole')
            if isinstance(here, list | tuple):
                if not (key.isdigit() and int(key) < len(here)):
                    raise ConfigError(f'{self}: {place} has the entries 0 to {len(here) - 1}, got {key!r}')
            elif not isinstance(here, dict):
                raise ConfigError(f'{self}: {place} is {here!r}, so nothing can be set inside it')
            elif key not in here and not (last and self._may_be_new(place)):
                raise ConfigError(f'{self}: {place} has no key {key!r}{did_you_mean(key, map(str, here))}')
            here, place = _child(here, key), f'{place}.{key}'

    def _may_be_new(self, place: str) -> bool:
        """Anything may be given a new argument; a new hook must be a hook."""
        return place != 'default_hooks' or isinstance(self.value, Mapping)


def _child(owner: Any, key: str) -> Any:
    if isinstance(owner, list | tuple):
        return owner[int(key)]
    return dict.get(owner, key)  # not through ConfigDict, which would import a class
