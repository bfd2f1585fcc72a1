"""Template functions: Conversation -> Sample."""

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np

from vlmtune.data.processor import Processor
from vlmtune.structures import Conversation, ImageSize, Sample
from vlmtune.utils.errors import ConfigError, DataError

LossRule: TypeAlias = Literal['all_turns', 'last_turn', 'first_turn', 'none']


def _learned(conversation: Conversation, rule: LossRule) -> list[int]:
    if rule not in get_args(LossRule):  # no mistake of a row, so that on_bad_sample does not skip it
        raise ConfigError(f'loss={rule!r} is unknown; expected one of {", ".join(get_args(LossRule))}')
    answers = [i for i, message in enumerate(conversation.messages) if message.role == 'assistant']
    by_rule = {'all_turns': answers, 'last_turn': answers[-1:], 'first_turn': answers[:1], 'none': []}
    flags = {i: conversation.messages[i].loss for i in answers}
    return [i for i in answers if (i in by_rule[rule] if flags[i] is None else flags[i])]


def chat_template_map_fn(
    conversation: Conversation, *, processor: Processor, image_sizes: Sequence[ImageSize], loss: LossRule = 'all_turns'
) -> Sample:
    """Tokenise with the chat template; learn the assistant turns that ``loss`` names.

    The rules are 'all_turns', 'last_turn', 'first_turn' and 'none'. A message's own ``loss`` flag wins over the rule,
    so that with 'none' only messages with ``loss=True`` are learned. System and user messages never are.

    Raises:
        ConfigError: there is no such rule.
        DataError: nothing in the conversation would be learned, or it does not fit the template.
    """
    learned = _learned(conversation, loss)
    if not learned:
        raise DataError('has no assistant turn to learn', kind='nothing_learned')
    return processor.tokenize(conversation, image_sizes=image_sizes, learned=learned)


def plain_text_map_fn(
    conversation: Conversation, *, processor: Processor, image_sizes: Sequence[ImageSize] = ()
) -> Sample:
    """Continued pretraining: the texts of the conversation and an end-of-text token, all learned.

    Raises:
        DataError: the conversation has images.
    """
    if conversation.images:
        raise DataError(f'plain_text_map_fn takes text only, but the row has {len(conversation.images)} images')
    text = processor.encode_text(''.join(message.text for message in conversation.messages))
    ids = np.append(text, np.int32(processor.tokenizer.eos_token_id)).astype(np.int32)
    return Sample(ids, ids.copy())
