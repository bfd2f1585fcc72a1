"""What models of our own have in common: image features take the places of image tokens before a language model.

A family that transformers lacks adds a config, a vision encoder and a projector; all else looks as it does there:
``model.vision_tower``, ``model.multi_modal_projector``, ``model.language_model``, ``lm_head``.

Letters: B rows, L tokens, H hidden size, F image features of all images, V tokens in the vocabulary.
"""

from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from vlmtune.utils.errors import ModelError


class ImageTextPreTrained(PreTrainedModel):
    """What transformers has to know of both classes below."""

    base_model_prefix = 'model'
    input_modalities = ['image', 'text']  # noqa: RUF012  # as the base class has it
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class ImageTextModel(ImageTextPreTrained):
    """A language model that sees images, without its head.

    A subclass makes ``vision_tower`` and ``multi_modal_projector``, then calls ``post_init``, and says what features
    images have. Its config has ``text_config``, ``vision_config`` and ``image_token_id``.

    Attributes:
        image_inputs: names of the tensors that ``get_image_features`` takes.
    """

    image_inputs: ClassVar[tuple[str, ...]] = ('pixel_values',)

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another table in its place."""
        self.language_model.set_input_embeddings(value)

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """float[B, L, H] of long[B, L]: what the language model reads in place of text."""
        return self.get_input_embeddings()(input_ids)

    def get_image_features(self, **images: Tensor) -> Tensor:
        """float[F, H]: what the language model reads in place of image tokens, in the order of these."""
        raise NotImplementedError

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """Hidden states of the language model, float[B, L, H].

        Args:
            input_ids: long[B, L]; as many image tokens as there are features.
            inputs_embeds: float[B, L, H] in place of them, without images.
            kwargs: the family's image inputs, and what the language model takes.

        Raises:
            ModelError: image tokens and features differ in number.
        """
        images = {name: kwargs.pop(name) for name in self.image_inputs if kwargs.get(name) is not None}
        if inputs_embeds is None:
            inputs_embeds = self.embed_text(cast(Tensor, input_ids))
            if 'pixel_values' in images:  # generate shows those once, but goes on passing what stands beside them
                inputs_embeds = self._with_images(cast(Tensor, input_ids), inputs_embeds, images)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)

    def _with_images(self, input_ids: Tensor, embedded: Tensor, images: dict[str, Tensor]) -> Tensor:
        features = self.get_image_features(**images).to(embedded)
        places = input_ids == self.config.image_token_id
        if (found := int(places.sum())) != len(features):
            raise ModelError(
                f'{found} image tokens (id {self.config.image_token_id}) in the input, but the images make '
                f'{len(features)} features; tokens and images must come from the same Processor'
            )
        return embedded.masked_scatter(places.unsqueeze(-1), features)


class ImageTextForGeneration(ImageTextPreTrained, GenerationMixin):
    """An ``ImageTextModel`` and its head.

    Attributes:
        model_class: a subclass names it.
    """

    model_class: ClassVar[type[ImageTextModel]]
    _tied_weights_keys = {'lm_head.weight': 'model.language_model.embed_tokens.weight'}  # noqa: RUF012

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        text = config.get_text_config()
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Put another head in its place."""
        self.lm_head = cast(nn.Linear, value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits float[B, L, V], and the loss where there are labels.

        A family with more image inputs names them in a ``forward`` of its own: ``generate`` takes what has a name
        there.

        Args:
            input_ids: long[B, L].
            attention_mask: as the language model takes it.
            position_ids: long[B, L].
            pixel_values: as the family's ``get_image_features`` takes them.
            labels: long[B, L], not shifted.
            logits_to_keep: so many last positions, or those of a mask or list; 0: all.
            kwargs: as for ``ImageTextModel.forward``.
        """
        extra = {name: kwargs.pop(name) for name in ('num_items_in_batch', 'shift_labels') if name in kwargs}
        kwargs |= dict(attention_mask=attention_mask, position_ids=position_ids, pixel_values=pixel_values)
        output = self.model(input_ids=input_ids, **kwargs)
        hidden = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        text = self.config.get_text_config()
        logits = self.lm_head(hidden[:, kept]) / (getattr(text, 'logits_scaling', None) or 1)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text.vocab_size, **extra)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )
