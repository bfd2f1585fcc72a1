"""Ways in which checkpoints lie on disk other than that of transformers: names, configs and processor files."""

from vlmtune.layouts.layout import Layout
from vlmtune.layouts.llava_parts import check_projector, check_same_parts, find_source
from vlmtune.layouts.names import NameMap, Rule, rename
from vlmtune.layouts.view import find_layout, native_view, read_config
from vlmtune.layouts.weights import Weight, open_native, open_weights, to_native, to_original

__all__ = [
    'Layout',
    'NameMap',
    'Rule',
    'Weight',
    'check_projector',
    'check_same_parts',
    'find_layout',
    'find_source',
    'native_view',
    'open_native',
    'open_weights',
    'read_config',
    'rename',
    'to_native',
    'to_original',
]
