"""Model FLOPs of a training step of a vision-language model, and what a device can do at most.

Letters: B rows, L tokens, S segments (samples of a pack, images or tiles), P patches, N weights of linear layers.

The rule, after PaLM's model FLOPs (https://arxiv.org/abs/2204.02311, appendix B), for a model whose parts differ:

- A weight costs 2 FLOPs in the forward pass for every row that goes through it: patches in the vision encoder (and the
  class token), image tokens in the projector, tokens in the language model, supervised positions only in the head.
- Where gradients flow through a part, 2 more for the gradient of its input (frozen weights: 4N), and where the weight
  trains, 2 more for its own (trained: 6N). A part that gradients never reach costs its forward pass alone (2N): a
  frozen vision encoder. LoRA layers are frozen weights plus small trained ones.
- Gradients flow through a part if anything trains in it or before it; within a part no difference is made.
- Attention: 4 x width for every pair of a query and a key that it sees, three times that where gradients flow. Causal:
  half of the square of each sample, less where a layer has a window. Vision: the square of each image or tile;
  windows as if every one were full (an upper bound at the edges of an image).
- Left out: recomputation by gradient checkpointing, norms, activations, rotary embeddings, embedding look-ups, padding.
- Of a mixture of experts, only the experts that a token visits. The wider bidirectional attention that some families
  give to images and prompts counts as causal. LLaVA-NeXT and OneVision project some patches that never become tokens;
  those are left out, and so are the keys and values of a resampler. LLaVA's encoder runs layers behind the one whose
  features are read; they count.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmtune.engine.dimensions import Stack, experts_share, text_stack, vision_stack
from vlmtune.families import PARTS, PartName
from vlmtune.models import SupervisedFinetune
from vlmtune.models.sharded import logical_shape
from vlmtune.ops.positions import segment_lengths
from vlmtune.structures import IGNORE_INDEX

_BEFORE: Mapping[PartName, tuple[PartName, ...]] = {
    'vision_encoder': (),
    'projector': ('vision_encoder',),
    'embeddings': (),
    'llm': ('vision_encoder', 'projector', 'embeddings'),
    'lm_head': ('vision_encoder', 'projector', 'embeddings', 'llm'),
}

# Dense bf16 peaks in TFLOP/s without sparsity, as the vendors' data sheets give them (V100: fp16, it has no bf16). The
# first row whose words all occur in the device's name counts.
_PEAKS: tuple[tuple[str, float], ...] = (
    ('GB200', 2500),
    ('B200', 2250),
    ('GH200', 989),
    ('H200', 989),
    ('H100 PCIe', 756),
    ('H100 NVL', 835),
    ('H100', 989),
    ('H800', 989),
    ('H20', 148),
    ('A100', 312),
    ('A800', 312),
    ('A40', 150),
    ('A30', 165),
    ('A10', 125),
    ('L40S', 362),
    ('L40', 181),
    ('L4', 121),
    ('RTX 6000 Ada', 364),
    ('RTX 5090', 210),
    ('RTX 4090', 165),
    ('RTX 3090', 71),
    ('V100', 125),
)


def peak_tflops(device_name: str) -> float | None:
    """The dense bf16 peak of a device in TFLOP/s; None for one that the table lacks.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it, for example 'NVIDIA H100 80GB HBM3'.
    """
    words = set(re.split(r'[^a-z0-9]+', device_name.lower()))
    return next((peak for name, peak in _PEAKS if set(name.lower().split()) <= words), None)


class Rows(NamedTuple):
    """What goes through the parts in one micro-batch."""

    tokens: int
    supervised: int
    image_tokens: int
    samples: Tensor  # long[S]: tokens of each sample
    images: Tensor  # long[S]: patches of each image or tile, class token included


class Flops(NamedTuple):
    """Model FLOPs, forward and backward."""

    vision: float  # encoder and projector
    llm: float
    head: float
    attention: float  # of both stacks

    @property
    def total(self) -> float:
        """All of it."""
        return self.vision + self.llm + self.head + self.attention


def matmul_weights(module: nn.Module, *, visited: float = 1.0) -> float:
    """Weights of a leaf module that are multiplied with every row that goes through it, in logical size.

    Args:
        module: 4-bit and sharded layers count as what they stand for.
        visited: share of a mixture's experts.
    """
    if isinstance(module, nn.Linear):  # bitsandbytes' are
        return module.in_features * module.out_features
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):  # patch embeddings: one row per patch
        kernel = torch.Size(module.kernel_size).numel()
        return module.in_channels * module.out_channels * kernel // module.groups
    if isinstance(module, nn.Embedding):
        return 0
    shapes = [logical_shape(p) for p in module.parameters(recurse=False)]
    routers = sum(shape.numel() for shape in shapes if len(shape) == 2)
    experts = sum(shape.numel() for shape in shapes if len(shape) == 3 and shape[0] > 1)
    return routers + visited * experts


@dataclass
class _Part:
    frozen: float = 0.0
    trained: float = 0.0
    flows: bool = False  # whether gradients do

    @property
    def per_row(self) -> float:
        """FLOPs of one row, forward and backward."""
        return self.frozen * (4 if self.flows else 2) + self.trained * 6


class ModelFlops:
    """FLOPs of micro-batches of one model. Built once; what trains must be settled."""

    def __init__(self, model: SupervisedFinetune) -> None:
        self.config = model.model.config
        self.parts = _count_parts(model)
        self.text, self.vision = text_stack(self.config), vision_stack(self.config)
        vision_names = [n for n, _ in model.model.named_parameters() if model.part_of(n) == 'vision_encoder']
        self.class_tokens = int(any(n.endswith(('class_embedding', 'cls_token')) for n in vision_names))

    def of(self, batch: Mapping[str, Tensor]) -> Flops:
        """FLOPs of one micro-batch, as the collator makes it."""
        return self.of_rows(self.rows(batch))

    def of_rows(self, rows: Rows) -> Flops:
        """FLOPs of what goes through the parts."""
        parts = self.parts
        vision = parts['vision_encoder'].per_row * int(rows.images.sum())
        projector = parts['projector'].per_row * rows.image_tokens
        attention = self._attention(self.text, rows.samples, causal=True, flows=parts['llm'].flows)
        if self.vision is not None and len(rows.images):
            flows = parts['vision_encoder'].flows
            attention += self._attention(self.vision, rows.images, causal=False, flows=flows)
        return Flops(
            vision=vision + projector,
            llm=parts['llm'].per_row * rows.tokens,
            head=parts['lm_head'].per_row * rows.supervised,
            attention=attention,
        )

    def rows(self, batch: Mapping[str, Tensor]) -> Rows:
        """Count what goes through the parts; padding and the collator's filler are left out."""
        ids, mask = batch['input_ids'], batch.get('attention_mask')
        samples = segment_lengths(batch['position_ids']) if mask is None else mask.sum(dim=-1)
        supervised = int((batch['labels'][:, 1:] != IGNORE_INDEX).sum())
        if 'filler_tokens' in batch:  # it comes last, and only where there are no other images
            none = torch.empty(0, dtype=torch.long)
            return Rows(int(samples[:-1].sum()), supervised, image_tokens=0, samples=samples[:-1], images=none)
        image = getattr(self.config, 'image_token_id', None)
        return Rows(
            tokens=int(samples.sum()),
            supervised=supervised,
            image_tokens=0 if image is None or self.vision is None else int((ids == image).sum()),
            samples=samples,
            images=self._images(batch) + self.class_tokens,
        )

    def _images(self, batch: Mapping[str, Tensor]) -> Tensor:
        """long[S]: patches of each image or tile."""
        pixels = batch.get('pixel_values', batch.get('pixel_bytes'))
        if pixels is None or self.vision is None:  # also where the encoder's features come from a cache
            return torch.empty(0, dtype=torch.long)
        if 'image_grid_thw' in batch:
            frames, height, width = batch['image_grid_thw'].unbind(dim=-1)
            return (height * width).repeat_interleave(frames)
        if 'patch_grids' in batch:
            return batch['patch_grids'].prod(dim=-1)
        # float[..., C, height, width]
        size = self.config.vision_config.patch_size
        rows, columns = (size, size) if isinstance(size, int) else size
        per_tile = (pixels.shape[-2] // rows) * (pixels.shape[-1] // columns)
        return torch.full((pixels.shape[:-3].numel(),), per_tile)

    @staticmethod
    def _attention(stack: Stack, lengths: Tensor, *, causal: bool, flows: bool) -> float:
        lengths = lengths.double()
        pairs = {window: _pairs(lengths, window, causal=causal) for window in set(stack.windows)}
        return 4 * stack.queries * sum(pairs[window] for window in stack.windows) * (3 if flows else 1)


def _pairs(lengths: Tensor, window: int | None, *, causal: bool) -> float:
    """Pairs of a query and a key that attention looks at, over all segments."""
    seen = lengths if window is None else lengths.clamp(max=window)
    return float((seen * (lengths - seen / 2) if causal else seen * lengths).sum())


def _count_parts(model: SupervisedFinetune) -> dict[PartName, _Part]:
    visited = experts_share(model.model.config)
    parts = {part: _Part() for part in PARTS}
    for name, module in model.model.named_modules():
        own = list(module.parameters(recurse=False))
        if own and (weights := matmul_weights(module, visited=visited)):
            part = parts[model.part_of(name)]
            if own[0].requires_grad:
                part.trained += weights
            else:
                part.frozen += weights
    for name in gradient_parts(model):
        parts[name].flows = True
    return parts


def gradient_parts(model: SupervisedFinetune) -> set[PartName]:
    """The parts that gradients flow through: something trains in them or before them."""
    training = {model.part_of(name) for name in model.named_trainable()}
    return {part for part in PARTS if not training.isdisjoint((part, *_BEFORE[part]))}


def device_peak(device: torch.device) -> tuple[str, float | None]:
    """The name of a device and its dense bf16 peak in TFLOP/s, where it is known."""
    name: Any = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    return name, peak_tflops(name)
