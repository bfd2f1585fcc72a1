"""Sizes of a model's two stacks of layers, read from its config."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stack:
    """The layers of a language model or of a vision encoder.

    Attributes:
        hidden: width of the residual stream.
        queries: attention heads times head dimension.
        keys: the same of keys (and of values); smaller than ``queries`` where heads share them.
        mlp: width inside the MLP; of a mixture, that of the experts which one token visits, together.
        windows: one entry per layer: how many positions attention looks at, None for all.
    """

    hidden: int
    queries: int
    keys: int
    mlp: int
    windows: tuple[int | None, ...]

    @property
    def layers(self) -> int:
        """How many layers."""
        return len(self.windows)


def text_stack(config: Any) -> Stack:
    """Of the language model; ``config`` is the whole model's."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, 'head_dim', None) or text.hidden_size // heads
    experts = getattr(text, 'num_experts_per_tok', None)
    mlp = experts * text.moe_intermediate_size if experts else text.intermediate_size
    types = getattr(text, 'layer_types', None) or ['sliding_attention'] * text.num_hidden_layers
    window = getattr(text, 'sliding_window', None)
    windows = tuple(window if kind == 'sliding_attention' else None for kind in types)
    keys = (getattr(text, 'num_key_value_heads', None) or heads) * head_dim
    return Stack(text.hidden_size, heads * head_dim, keys, mlp, windows)


def vision_stack(config: Any) -> Stack | None:
    """Of the vision encoder; None where there is none. Windows are counted in patches."""
    vision = getattr(config, 'vision_config', None)
    if vision is None:
        return None
    hidden = getattr(vision, 'embed_dim', None) or vision.hidden_size  # Qwen2-VL: hidden_size is the language model's
    mlp = getattr(vision, 'intermediate_size', None) or int(hidden * vision.mlp_ratio)
    full = getattr(vision, 'fullatt_block_indexes', None)  # Qwen2.5-VL: the other layers look at windows
    side = vision.window_size // vision.patch_size if full is not None else 0
    windows = tuple(None if full is None or i in full else side**2 for i in range(vision.num_hidden_layers))
    return Stack(hidden, hidden, hidden, mlp, windows)


def experts_share(config: Any) -> float:
    """The share of a mixture's experts that one token visits; 1 without experts."""
    text = config.get_text_config()
    visited, experts = getattr(text, 'num_experts_per_tok', None), getattr(text, 'num_experts', None)
    return visited / experts if visited and experts else 1.0
