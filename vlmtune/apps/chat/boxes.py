"""The boxes of an answer, for whoever asked: as numbers on standard output and drawn into a file."""

import json
from pathlib import Path

from PIL import Image

from vlmtune.data import Processor
from vlmtune.data.boxes import draw_boxes, read_boxes
from vlmtune.data.images import load_image, read_image_size
from vlmtune.structures import Conversation
from vlmtune.utils.errors import ConfigError


def check_drawing(file: str) -> None:
    """Raises ConfigError if no image can be written to ``file``; it is told before a model is loaded."""
    path = Path(file).expanduser()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE}
    if path.suffix.lower() not in known:
        raise ConfigError(f'--draw-boxes {file}: expected the name of an image file, for example boxes.png')
    if not path.absolute().parent.is_dir():
        raise ConfigError(f'--draw-boxes {file}: there is no folder {path.absolute().parent}')


def report_boxes(
    answer: str, *, asked: Conversation, processor: Processor, show: bool = True, draw_to: str | None = None
) -> None:
    """Print one line of JSON, ``{"image": path, "boxes": [[x1, y1, x2, y2], ...]}``, and draw the boxes.

    The boxes are in pixels of the last image that was shown, upright. Where no image was shown, there is nothing to do.

    Args:
        answer: what the model wrote.
        asked: the conversation before the answer.
        processor: of the model.
        show: print the line.
        draw_to: an image file, overwritten; the image with its boxes, also where there are none.

    Raises:
        UserError: the image is gone, or ``draw_to`` cannot be written.
    """
    if not asked.images or not (show or draw_to):
        return
    image = asked.images[-1]
    boxes = read_boxes(answer, processor=processor, image_size=read_image_size(image))
    if show:
        print(json.dumps({'image': str(image), 'boxes': [[round(number) for number in box] for box in boxes]}))
    if draw_to:
        try:
            draw_boxes(load_image(image), boxes).save(Path(draw_to).expanduser())
        except OSError as error:
            raise ConfigError(f'--draw-boxes {draw_to}: cannot be written ({error})') from error
