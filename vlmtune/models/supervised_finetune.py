"""The model that is trained: a transformers model, its parts tuned as the config says, and the loss.

Letters: B rows, L tokens, H hidden size, N supervised positions.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.families import PartName
from vlmtune.models.loading import load_model, parse_dtype, read_family
from vlmtune.models.lora import inject_lora
from vlmtune.models.quantization import quantization_config
from vlmtune.models.tuning import part_of, plan_parts, tunable_modules
from vlmtune.ops import linear_cross_entropy
from vlmtune.registry import MODELS
from vlmtune.structures import IGNORE_INDEX
from vlmtune.utils.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartReport:
    """One row of the table that says what is trained."""

    part: PartName
    mode: str
    parameters: int
    trainable: int
    lr: float | None


@MODELS.register_module()
class SupervisedFinetune(nn.Module):
    """A causal language model or image-text-to-text model with tunable parts.

    Weights that train and all layer norms are float32, the others ``dtype``; the forward pass runs under autocast to
    ``dtype``.

    Args:
        pretrained_model_name_or_path: a folder or a hub id.
        tune: part -> 'frozen', 'lora', 'full', or a dict with the part's own settings.
        lora: settings that all parts in mode lora share (r, alpha, dropout, use_dora, use_rslora, target_modules).
        quantization: None, 'nf4' or 'int8' for the frozen linear layers of the language model.
        dtype: 'bfloat16' or 'float32'.
        gradient_checkpointing: recompute activations in the backward pass.
        attn_implementation: as transformers calls it: 'sdpa', 'flash_attention_2', 'eager'.
        vocab_size: tokens of a tokenizer that got new ones; the embeddings grow to at least as many, and must train.
        device: where quantised weights are made.

    Raises:
        ConfigError: the settings contradict each other.
        ModelError: the checkpoint cannot be read or its family is not supported.
    """

    def __init__(
        self,
        pretrained_model_name_or_path: str,
        *,
        tune: Mapping[str, Any],
        lora: Mapping[str, Any] | None = None,
        quantization: str | None = None,
        dtype: str = 'bfloat16',
        gradient_checkpointing: bool = False,
        attn_implementation: str = 'sdpa',
        vocab_size: int | None = None,
        device: str = 'cpu',
    ) -> None:
        super().__init__()
        self.dtype = parse_dtype(dtype)
        self.quantization = quantization
        self.check(pretrained_model_name_or_path, tune=tune, lora=lora, quantization=quantization, dtype=dtype)
        self.model, self.family = load_model(
            pretrained_model_name_or_path,
            dtype=self.dtype,
            quantization=quantization,
            attn_implementation=attn_implementation,
            device=device,
        )
        tied = self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight
        self.plans = plan_parts(tune, family=self.family, lora=lora, tied=tied)
        self._grow_embeddings(vocab_size)
        self._apply_plans()
        if gradient_checkpointing:
            self.model.activation_checkpointing_enable({'use_reentrant': False})

    @staticmethod
    def check(
        pretrained_model_name_or_path: str,
        *,
        tune: Mapping[str, Any],
        lora: Mapping[str, Any] | None = None,
        quantization: str | None = None,
        dtype: str = 'bfloat16',
        **_: Any,
    ) -> None:
        """Tell whether these settings can be right, from the checkpoint's config.json alone.

        Raises:
            ConfigError: an unknown word, part or setting, or a contradiction.
            ModelError: the checkpoint cannot be read or its family is not supported.
        """
        family = read_family(pretrained_model_name_or_path)
        plans = plan_parts(tune, family=family, lora=lora)
        quantization_config(quantization, family=family, dtype=parse_dtype(dtype))
        if quantization is not None and plans['llm'].mode == 'full':
            raise ConfigError(
                f"quantization={quantization!r} needs a frozen llm; set tune llm='lora' or quantization=None"
            )

    # ---- building

    def _grow_embeddings(self, vocab_size: int | None) -> None:
        if vocab_size is None:
            return
        if self.plans['embeddings'].mode == 'frozen':  # also where spare rows are left: those are noise until trained
            raise ConfigError('new tokens need embeddings that train; set tune embeddings="full", lm_head="full"')
        have = int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
        if vocab_size <= have:
            return
        logger.info('embeddings grow from %d to %d tokens', have, vocab_size)
        self.model.resize_token_embeddings(vocab_size)

    def _apply_plans(self) -> None:
        self.model.requires_grad_(False)
        self.lora_config = inject_lora(self.model, self.plans, family=self.family)
        for part, plan in self.plans.items():
            if plan.mode == 'full':
                for _, module in tunable_modules(self.model, part, family=self.family):
                    for parameter in module.parameters(recurse=False):
                        parameter.requires_grad_(True)
        for module in self.model.modules():  # a frozen bf16 layer norm cannot take the float32 of a trained layer (CPU)
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad or isinstance(module, nn.LayerNorm):
                    parameter.data = parameter.data.float()
        vision = [p for n, p in self.named_trainable().items() if self.part_of(n) in ('vision_encoder', 'projector')]
        self._trainable_vision = vision
        if self.family.casts_images:
            self.model.get_input_embeddings().register_forward_hook(self._to_model_dtype)

    def _to_model_dtype(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """A forward hook: text and images meet in one tensor, so text takes the dtype that the family gives images."""
        return output.to(next(p.dtype for p in self.model.parameters() if p.is_floating_point()))

    # ---- what is trained

    def part_of(self, name: str) -> PartName:
        """The part that a parameter of ``self.model`` belongs to."""
        return part_of(name, family=self.family)

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by their names inside the transformers model."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def report(self) -> list[PartReport]:
        """One row per part: mode, parameters, trainable ones, learning rate (None: the optimizer's)."""
        total, trainable = dict.fromkeys(self.plans, 0), dict.fromkeys(self.plans, 0)
        for name, parameter in self.model.named_parameters():
            part = self.part_of(name)
            total[part] += _logical_size(parameter)
            trainable[part] += parameter.numel() if parameter.requires_grad else 0
        return [PartReport(part, plan.mode, total[part], trainable[part], plan.lr) for part, plan in self.plans.items()]

    def load_trainable(self, state: Mapping[str, Tensor]) -> None:
        """Set the trained weights.

        Raises:
            CheckpointError: names or shapes are not exactly those that train.
        """
        mine = self.named_trainable()
        missing, extra = sorted(set(mine) - set(state)), sorted(set(state) - set(mine))
        if missing or extra:
            raise CheckpointError(
                f'the checkpoint does not fit the tuned parts: {len(missing)} tensors are missing '
                f'(first: {missing[:1]}), {len(extra)} are not trained here (first: {extra[:1]}); '
                'use the config that made it'
            )
        wrong = [name for name, p in mine.items() if p.shape != state[name].shape]
        if wrong:
            name = wrong[0]
            raise CheckpointError(
                f'{name} is {tuple(state[name].shape)} in the checkpoint, {tuple(mine[name].shape)} here'
            )
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(state[name])

    # ---- forward

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """The sum of the cross entropies over the supervised positions.

        Args:
            labels: long[B, L], not shifted, IGNORE_INDEX where nothing is learned.
            inputs: input_ids long[B, L], position_ids, and what the family takes besides.

        Returns:
            float32 scalar; divide by the supervised tokens of the whole optimizer step.
        """
        device = labels.device.type
        with torch.autocast(device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.model.base_model(**inputs, use_cache=False)[0]
            targets = labels[:, 1:]
            keep = targets != IGNORE_INDEX
            head = self.model.get_output_embeddings()
            loss = linear_cross_entropy(
                hidden[:, :-1][keep],
                weight=head.weight,
                bias=head.bias,
                targets=targets[keep],
                transform=logit_transform(self.model.config.get_text_config()),
            )
        if 'pixel_values' not in inputs and self._trainable_vision:
            # Every rank must give every trainable weight a gradient, also for a batch without images.
            loss = loss + 0.0 * torch.stack([p.sum() for p in self._trainable_vision]).sum()
        return loss


def logit_transform(text_config: Any) -> Callable[[Tensor], Tensor] | None:
    """What the family does to its logits: Granite divides, Gemma 2 caps softly; None for the others."""
    scale = getattr(text_config, 'logits_scaling', None)
    cap = getattr(text_config, 'final_logit_softcapping', None)
    if scale is not None and scale != 1:
        return lambda logits: logits / scale
    if cap is not None:
        return lambda logits: cap * torch.tanh(logits / cap)
    return None


def _logical_size(parameter: nn.Parameter) -> int:
    """Number of weights; bitsandbytes stores two 4-bit weights in one element."""
    state = getattr(parameter, 'quant_state', None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
