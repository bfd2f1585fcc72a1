"""How much memory a training step will take, from sizes alone; no weight need be there.

Letters: i bytes of the computation's dtype (2 for bfloat16), H hidden size, M width of the MLP, Q and K widths of the
queries and of the keys.

- Weights: trained ones 4 bytes (float32) and i for the copy that autocast makes of each; frozen ones their dtype's;
  quantised ones 0.52 bytes (nf4 with double quantisation) or 1 (int8).
- Gradients: 4 bytes per trained weight. Optimizer: measured, by stepping it once over a small parameter.
- ZeRO (https://arxiv.org/abs/1910.02054): trained weights and gradients have the computation's dtype, and the optimizer
  holds a float32 copy of the weights, too. Stage 1 divides the optimizer among the ranks, 2 the gradients, 3 all
  weights. What is offloaded counts nothing.
- Activations that one layer keeps for its backward pass, per row: norms 2 x (8 + i) x H, attention i x (2Q + 2K), MLP
  4 x i x M; LoRA: i for each input of an adapted layer (1 more with dropout) where the computation is not float32 or
  there is dropout. One more layer's worth for the gradients of activations while it runs backward. With checkpointing
  only the input of a layer is kept, i x H, and the worth of two layers. Where gradients do not flow, one layer's worth.
- Loss: one chunk of logits, 4 bytes each (and i where the computation is not float32), and the learned hidden states
  with their gradient, i each.

Left out: the CUDA context (about 0.5 GiB), fragmentation, workspaces, buffers of the gradient exchange; and that
gradients are not all there when activations are most. On a CPU the estimate was 9 to 24 % too high
(benchmarks/results/memory_estimate.md, by benchmarks/memory_estimate.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from vlmtune.engine.deepspeed_config import zero_stage
from vlmtune.engine.dimensions import Stack, text_stack, vision_stack
from vlmtune.engine.flops import gradient_parts
from vlmtune.engine.optim import build_optimizer
from vlmtune.families import PartName
from vlmtune.models import SupervisedFinetune
from vlmtune.models.sharded import logical_shape
from vlmtune.ops.cross_entropy import chunk_rows

QUANTIZED_BYTES = {'nf4': 0.52, 'int8': 1.0}
_PROBE = 1 << 16  # weights; 8-bit optimizers keep small parameters in 32 bit


class Load(NamedTuple):
    """What one micro-batch brings."""

    tokens: int  # padding included
    patches: int
    supervised: int


class MemoryEstimate(NamedTuple):
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float

    @property
    def fixed(self) -> float:
        """What is there whatever the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


@dataclass(frozen=True)
class Sharding:
    """How DeepSpeed divides a run. Stage 0 is a run without it."""

    stage: int = 0
    ranks: int = 1
    offloads: tuple[str, ...] = ()  # of 'optimizer', 'param'

    @classmethod
    def from_deepspeed(cls, config: Mapping[str, Any], *, ranks: int) -> 'Sharding':
        """Read it from a DeepSpeed configuration."""
        zero = config.get('zero_optimization') or {}
        devices = {n: (zero.get(f'offload_{n}') or {}).get('device', 'none') for n in ('optimizer', 'param')}
        return cls(zero_stage(config), ranks, tuple(name for name, device in devices.items() if device != 'none'))


def state_bytes_per_weight(optimizer: Mapping[str, Any]) -> float:
    """Bytes of optimizer state per trained weight: 8 for AdamW, 0 for SGD, about 2 for 8-bit AdamW.

    Args:
        optimizer: its settings, ``dict(type=AdamW, lr=...)``.
    """
    probe = nn.Parameter(torch.zeros(_PROBE))
    built = build_optimizer(optimizer, [probe])
    probe.grad = torch.ones_like(probe)
    built.step()
    tensors = [value for state in built.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors) / _PROBE


class MemoryModel:
    """Estimates for one model, also one on the meta device.

    Args:
        model: what trains must be settled.
        state_bytes: of the optimizer, per trained weight.
        sharding: by DeepSpeed.
    """

    def __init__(self, model: SupervisedFinetune, *, state_bytes: float, sharding: Sharding | None = None) -> None:
        self.model, self.state_bytes, self.sharding = model, state_bytes, sharding or Sharding()
        self.itemsize = model.dtype.itemsize
        self.trained, self.frozen, self.quantizable = _count_weights(model)
        config = model.model.config
        self.text, self.vision = text_stack(config), vision_stack(config)
        self.vocabulary: int = model.model.get_output_embeddings().out_features
        self.flows = gradient_parts(model)
        self.checkpointed = {part: self._checkpoints(part) for part in ('vision_encoder', 'llm')}
        self._adapted = {part: self._adapter_bytes(part) for part in ('vision_encoder', 'llm')}

    def estimate(
        self, load: Load, *, checkpointing: bool | None = None, quantization: str | None = None
    ) -> MemoryEstimate:
        """Bytes while a micro-batch is learned.

        Args:
            load: the micro-batch.
            checkpointing: of all parts; None is as the model does it.
            quantization: 'nf4' or 'int8'; None is the model's own.
        """
        zero, ranks = self.sharding.stage, self.sharding.ranks
        word = quantization or self.model.quantization
        saved = 0.0 if word is None else self.quantizable * (self.itemsize - QUANTIZED_BYTES[word])
        trained_bytes = (4 + (self.itemsize if self.itemsize < 4 else 0)) if zero == 0 else self.itemsize
        gradient_bytes = 4 if zero == 0 else self.itemsize
        optimizer = self.trained * (self.state_bytes + (4 if zero else 0)) / (ranks if zero >= 1 else 1)
        weights = (self.trained * trained_bytes + self.frozen - saved) / (ranks if zero >= 3 else 1)
        return MemoryEstimate(
            weights=0.0 if 'param' in self.sharding.offloads else weights,
            gradients=self.trained * gradient_bytes / (ranks if zero >= 2 else 1),
            optimizer=0.0 if 'optimizer' in self.sharding.offloads else optimizer,
            activations=self._activations(load, checkpointing),
            loss=self._loss(load.supervised),
        )

    def _loss(self, supervised: int) -> float:
        copy = self.itemsize if self.itemsize < 4 else 0  # of a chunk, in the dtype of the product
        chunk = min(supervised, chunk_rows(self.vocabulary)) * self.vocabulary * (4 + copy)
        return chunk + supervised * self.text.hidden * 2 * self.itemsize

    def _activations(self, load: Load, checkpointing: bool | None) -> float:
        total = self._stack_bytes('llm', self.text, load.tokens, checkpointing)
        if self.vision is not None and load.patches:
            vision = self._stack_bytes('vision_encoder', self.vision, load.patches, checkpointing)
            if 'vision_encoder' in self.flows:
                return total + vision
            return max(total, vision)  # what vision needs is free again when the language model runs
        return total

    def _stack_bytes(self, part: PartName, stack: Stack, rows: int, checkpointing: bool | None) -> float:
        i = self.itemsize
        layer: float = 2 * (8 + i) * stack.hidden + i * (2 * stack.queries + 2 * stack.keys) + 4 * i * stack.mlp
        layer += self._adapted[part] / stack.layers
        if part not in self.flows:
            return rows * layer
        if self.checkpointed[part] if checkpointing is None else checkpointing:
            return rows * (stack.layers * i * stack.hidden + 2 * layer)
        return rows * (stack.layers + 1) * layer

    def _checkpoints(self, part: PartName) -> bool:
        paths = self.model.family.part_paths(part)
        modules = [module for path in paths for module in self.model.model.get_submodule(path).modules()]
        return any(getattr(module, 'gradient_checkpointing', False) for module in modules)

    def _adapter_bytes(self, part: PartName) -> float:
        config = self.model.lora_config
        dropout = config is not None and config.lora_dropout > 0
        if config is None or (self.itemsize == 4 and not dropout):
            return 0.0
        inputs = sum(
            module.in_features
            for name, module in self.model.model.named_modules()
            if isinstance(module, nn.Linear) and '.lora_A.' in name and self.model.part_of(name) == part
        )
        return inputs * (self.itemsize + dropout)


def _count_weights(model: SupervisedFinetune) -> tuple[int, float, int]:
    """Trained weights, bytes of the frozen ones before quantisation, and how many of those can be quantised."""
    trained, quantizable = 0, 0
    frozen = 0.0
    for name, module in model.model.named_modules():
        linear = isinstance(module, nn.Linear)
        for key, parameter in module.named_parameters(recurse=False):
            is_matrix = linear and key == 'weight'
            size = int(module.in_features * module.out_features if is_matrix else logical_shape(parameter).numel())
            if parameter.requires_grad:
                trained += size if not _is_tied(model, name) else 0
            elif is_matrix and model.part_of(name) == 'llm':
                quantizable += size
                frozen += size * model.dtype.itemsize
            elif not _is_tied(model, name):
                frozen += size * parameter.element_size()
    return trained, frozen, quantizable


def _is_tied(model: SupervisedFinetune, name: str) -> bool:
    """Whether a module is a head whose weight is the embeddings'."""
    head, embeddings = model.model.get_output_embeddings(), model.model.get_input_embeddings()
    return head.weight is embeddings.weight and model.model.get_submodule(name) is head
