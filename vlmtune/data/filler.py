"""A sample that brings an image where a batch has none, and weighs nothing."""

from PIL import Image

from vlmtune.data.collate import LoadedSample
from vlmtune.data.processor import Processor
from vlmtune.data.sample_loading import to_tensors
from vlmtune.structures import Conversation, ImageRef, ImageSize, Message, Sample, TextPart, user_message

# Which is the cheapest depends on the family: some cut an image into tiles as its shape asks, some enlarge it first.
_SIZES = (ImageSize(32, 32), ImageSize(32, 128), ImageSize(128, 32))


def image_filler(processor: Processor) -> LoadedSample:
    """A blank image and a word, all labels IGNORE_INDEX.

    Where weights are sharded, computing a layer is something that all ranks do together, so all have to run the vision
    encoder or none.

    Args:
        processor: of a model that takes images.

    Returns:
        what the data set gives for a sample of the same kind.
    """
    sample = min((_blank_sample(processor, size) for size in _SIZES), key=lambda made: (made.patches, len(made)))
    (size,) = sample.image_sizes
    inputs = processor.image_bytes([Image.new('RGB', (size.width, size.height))])
    return to_tensors(sample, inputs, processor=processor, supervised=False)


def _blank_sample(processor: Processor, size: ImageSize) -> Sample:
    question = user_message('x', images=[0])
    talk = Conversation((question, Message('assistant', (TextPart('x'),))), (ImageRef(data=b''),))
    return processor.tokenize(talk, image_sizes=[size])
