"""The model that is trained: a transformers model, its parts tuned as the config says, and the loss.

Letters: B rows, L tokens, H hidden size, N supervised positions.
"""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.families import PartName
from vlmtune.layouts import check_projector
from vlmtune.models.attention import apply_attention, attention_inputs, check_attention, transformers_name
from vlmtune.models.checkpointing import apply_checkpointing
from vlmtune.models.kernels import apply_liger, check_liger
from vlmtune.models.loading import load_model, parse_dtype, read_family
from vlmtune.models.lora import inject_lora
from vlmtune.models.neftune import EmbeddingNoise
from vlmtune.models.quantization import quantization_config
from vlmtune.models.sharded import logical_shape
from vlmtune.models.tuning import part_of, plan_parts, set_dtypes, tunable_parameters
from vlmtune.models.vision_features import ready_images
from vlmtune.ops import finish_images, linear_cross_entropy
from vlmtune.registry import MODELS
from vlmtune.structures import IGNORE_INDEX
from vlmtune.utils.device import find_device
from vlmtune.utils.errors import ConfigError
from vlmtune.utils.imports import import_name
from vlmtune.utils.tensor_file import TensorLayout, check_tensors

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
        pretrained_model_name_or_path: a folder, a hub id, or the parts of a LLaVA, see ``layouts.llava_parts``.
        tune: part -> 'frozen', 'lora', 'full', or a dict with the part's own settings.
        lora: settings that all parts in mode lora share (r, alpha, dropout, use_dora, use_rslora, target_modules).
        quantization: None, 'nf4' or 'int8' for the frozen linear layers of the language model.
        dtype: 'bfloat16', 'float16' or 'float32'.
        gradient_checkpointing: recompute activations in the backward pass; a part's own setting comes first.
        attn_implementation: 'sdpa' (packed rows sample by sample), 'varlen' (torch's, GPU only), or transformers' own
            'eager', 'flash_attention_2', 'flash_attention_3', 'flex_attention'.
        neftune_noise_alpha: noise on the input embeddings while training, see ``models/neftune.py``; None: none.
        liger_kernel: use Liger's kernels (GPU only).
        vocab_size: tokens of a tokenizer that got new ones; the embeddings grow to at least as many, and must train.
        device: where quantised weights are made. 'meta' makes a model of sizes without weights, quantised ones plain.
        trust_remote_code: run the Python files of the model, see docs/security.md.
        revision: of a hub id; a commit where its code is run.

    Raises:
        ConfigError: the settings contradict each other.
        ModelError: the checkpoint cannot be read or its family is not supported.
    """

    def __init__(
        self,
        pretrained_model_name_or_path: str | Mapping[str, Any],
        *,
        tune: Mapping[str, Any],
        lora: Mapping[str, Any] | None = None,
        quantization: str | None = None,
        dtype: str = 'bfloat16',
        gradient_checkpointing: bool = False,
        attn_implementation: str = 'sdpa',
        neftune_noise_alpha: float | None = None,
        liger_kernel: bool = False,
        vocab_size: int | None = None,
        device: str = 'cpu',
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.dtype = parse_dtype(dtype)
        self.quantization = quantization
        self.check(
            pretrained_model_name_or_path,
            tune=tune,
            lora=lora,
            quantization=quantization,
            dtype=dtype,
            attn_implementation=attn_implementation,
            liger_kernel=liger_kernel,
            device=device,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        self.model, self.family = load_model(
            pretrained_model_name_or_path,
            dtype=self.dtype,
            quantization=quantization,
            attn_implementation=transformers_name(attn_implementation),
            device=device,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        apply_attention(self.model, attn_implementation, family=self.family)
        self._make_masks = None if self.family.masks is None else import_name(self.family.masks)
        tied = self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight
        self.plans = plan_parts(tune, family=self.family, lora=lora, tied=tied)
        self._grow_embeddings(vocab_size)
        self._apply_plans()
        self.plans = apply_checkpointing(self.model, self.plans, family=self.family, default=gradient_checkpointing)
        alpha = neftune_noise_alpha
        self._noise = EmbeddingNoise(self.model.get_input_embeddings(), alpha=alpha) if alpha else None
        if liger_kernel:
            apply_liger(self.model)

    @staticmethod
    def check(
        pretrained_model_name_or_path: str | Mapping[str, Any],
        *,
        tune: Mapping[str, Any],
        lora: Mapping[str, Any] | None = None,
        quantization: str | None = None,
        dtype: str = 'bfloat16',
        attn_implementation: str = 'sdpa',
        liger_kernel: bool = False,
        device: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        **_: Any,
    ) -> None:
        """Tell whether these settings can be right, from the checkpoint's config.json alone.

        Raises:
            ConfigError: an unknown word, part or setting, or a contradiction.
            ModelError: the checkpoint cannot be read or its family is not supported.
        """
        family = read_family(pretrained_model_name_or_path, trust_remote_code=trust_remote_code, revision=revision)
        plans = plan_parts(tune, family=family, lora=lora)
        check_projector(pretrained_model_name_or_path, mode=plans['projector'].mode if family.has_vision else 'frozen')
        quantization_config(quantization, family=family, dtype=parse_dtype(dtype))
        device = str(find_device()) if device is None else device
        check_attention(attn_implementation, device=device)
        if liger_kernel:
            check_liger(device=device)
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
        have = logical_shape(self.model.get_input_embeddings().weight)[0]
        if vocab_size <= have:
            return
        logger.info('embeddings grow from %d to %d tokens', have, vocab_size)
        has_values = not self.model.get_input_embeddings().weight.is_meta
        with torch.random.fork_rng(devices=[]):  # it draws more where weights are sharded; LoRA draws next
            self.model.resize_token_embeddings(vocab_size, mean_resizing=has_values)

    def _apply_plans(self) -> None:
        self.model.requires_grad_(False)
        self.lora_config = inject_lora(self.model, self.plans, family=self.family)
        for part, plan in self.plans.items():
            if plan.mode == 'full':
                for parameter in tunable_parameters(self.model, part, family=self.family):
                    parameter.requires_grad_(True)
        set_dtypes(self.model, dtype=self.dtype)
        self._trainable_vision = [  # with the parameters beside the language model that only images use
            parameter
            for name, parameter in self.named_trainable().items()
            if self.part_of(name) in ('vision_encoder', 'projector') or name in self.family.llm
        ]
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

    def trainable_layout(self) -> dict[str, TensorLayout]:
        """What a checkpoint has of each of them: the whole of it, in float32."""
        mine = self.named_trainable().items()
        return {name: TensorLayout(torch.float32, tuple(logical_shape(parameter))) for name, parameter in mine}

    def report(self) -> list[PartReport]:
        """One row per part: mode, parameters, trainable ones, learning rate (None: the optimizer's)."""
        total, trainable = dict.fromkeys(self.plans, 0), dict.fromkeys(self.plans, 0)
        for name, parameter in self.model.named_parameters():
            part = self.part_of(name)
            size = logical_shape(parameter).numel()
            total[part] += size
            trainable[part] += size if parameter.requires_grad else 0
        return [PartReport(part, plan.mode, total[part], trainable[part], plan.lr) for part, plan in self.plans.items()]

    def load_trainable(self, state: Mapping[str, Tensor]) -> None:
        """Set the trained weights.

        Raises:
            CheckpointError: names or shapes are not exactly those that train.
        """
        check_tensors({name: tensor.shape for name, tensor in state.items()}, wanted=self.trainable_layout())
        with torch.no_grad():
            for name, parameter in self.named_trainable().items():
                parameter.copy_(state[name])

    # ---- forward

    def model_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the transformers model takes: a batch without its labels, and what keeps the samples of a row apart."""
        inputs: dict[str, Any] = {n: tensor for n, tensor in batch.items() if n not in ('labels', 'filler_tokens')}
        if self.family.has_vision:
            frames = getattr(self.model.config.vision_config, 'temporal_patch_size', 1)
            inputs = finish_images(inputs, frames=frames)
        if 'image_features' in inputs:
            features = inputs.pop('image_features')
            inputs['mm_encoder_outputs'] = ready_images(self.model, features, family=self.family)
        if self._make_masks is not None:
            given = {name: inputs.get(name) for name in ('position_ids', 'token_type_ids', 'attention_mask')}
            inputs['attention_mask'] = self._make_masks(self.model.config, dtype=self.dtype, **given)
        elif 'attention_mask' not in inputs and 'position_ids' in inputs:
            inputs |= attention_inputs(self.model, position_ids=inputs['position_ids'])
        return inputs

    def _autocast(self, tensor: Tensor) -> torch.autocast:
        return torch.autocast(tensor.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def hidden_states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the head reads, float[B, L, H]; ``batch`` as for ``forward``."""
        noise = nullcontext() if self._noise is None else self._noise.during(batch)
        with self._autocast(batch['input_ids']), noise:
            return self.model.base_model(**self.model_inputs(batch), use_cache=False)[0]

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """The sum of the cross entropies over the supervised positions.

        Args:
            labels: long[B, L], not shifted, IGNORE_INDEX where nothing is learned.
            inputs: input_ids long[B, L], position_ids, and what the family takes besides.

        Returns:
            float32 scalar; divide by the supervised tokens of the whole optimizer step.
        """
        hidden = self.hidden_states(inputs)
        targets = labels[:, 1:]
        keep = targets != IGNORE_INDEX
        head = self.model.get_output_embeddings()
        with self._autocast(labels):
            loss = linear_cross_entropy(
                hidden[:, :-1][keep],
                weight=head.weight,
                bias=head.bias,
                targets=targets[keep],
                **logit_settings(self.model.config.get_text_config()),
            )
        if not {'pixel_values', 'pixel_bytes', 'image_features'} & set(inputs) and self._trainable_vision:
            # Every rank must give every trainable weight a gradient, also for a batch without images.
            loss = loss + 0.0 * torch.stack([p.sum() for p in self._trainable_vision]).sum()
        return loss


def logit_settings(text_config: Any) -> dict[str, Any]:
    """What the family does to its logits, for ``linear_cross_entropy``: Granite divides, Gemma 2 caps softly."""
    scale = getattr(text_config, 'logits_scaling', None)
    cap = getattr(text_config, 'final_logit_softcapping', None)
    return dict(scale=1 / scale) if scale else dict(softcap=cap) if cap else {}
