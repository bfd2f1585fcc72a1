"""From a row in one of the known formats to a Conversation: one function per format.

A function of your own takes a row (a dict) and returns a ``vlmtune.structures.Conversation``; it raises
``vlmtune.utils.errors.DataError`` where the row is wrong.
"""

from vlmtune.data.map_fns.alpaca import alpaca_map_fn
from vlmtune.data.map_fns.llava import llava_map_fn
from vlmtune.data.map_fns.minicpmv import minicpmv_map_fn
from vlmtune.data.map_fns.openai import openai_map_fn
from vlmtune.data.map_fns.sharegpt import sharegpt_map_fn
from vlmtune.data.map_fns.text import text_map_fn

__all__ = ['alpaca_map_fn', 'llava_map_fn', 'minicpmv_map_fn', 'openai_map_fn', 'sharegpt_map_fn', 'text_map_fn']
