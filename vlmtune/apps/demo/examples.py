"""A folder of examples for the demo: pictures to click, and questions to click."""

from dataclasses import dataclass
from pathlib import Path

from vlmtune.data.images import load_image
from vlmtune.structures import ImageRef
from vlmtune.utils.errors import ConfigError, DataError

PROMPTS = 'prompts.txt'
ENDINGS = ('.avif', '.bmp', '.gif', '.jp2', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
MAX_PICTURES, MAX_PROMPTS = 48, 12  # what a page can show


@dataclass(frozen=True)
class Picture:
    """A picture to click; ``question`` is its own, or ''."""

    path: Path
    question: str = ''


@dataclass(frozen=True)
class Examples:
    """What can be clicked instead of uploaded and typed."""

    pictures: tuple[Picture, ...] = ()
    prompts: tuple[str, ...] = ()


def read_example_folder(folder: str | Path) -> Examples:
    """The examples of a folder, in the order of their names.

    Its images are the gallery. ``NAME.txt`` beside ``NAME.png`` is the question that belongs to that picture. Each line
    of ``prompts.txt`` is a question that fits all. Every image is decoded once, so that no click ends in an error.

    Raises:
        ConfigError: no such folder, nothing in it, or more than a page can show.
        DataError: an image or a text cannot be read.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(f'--examples {folder}: no folder at {path.absolute()}')
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
    prompts = tuple(filter(None, map(str.strip, _text(path / PROMPTS).splitlines())))
    if not files and not prompts:
        raise ConfigError(f'--examples {path}: expected images ({" ".join(ENDINGS)}) or {PROMPTS}, found neither')
    for found, most, what in ((files, MAX_PICTURES, 'images'), (prompts, MAX_PROMPTS, f'lines in {PROMPTS}')):
        if len(found) > most:
            raise ConfigError(f'--examples {path} has {len(found)} {what}; expected at most {most}')
    for file in files:
        load_image(ImageRef(path=str(file.absolute())))
    pictures = tuple(Picture(file.absolute(), _text(file.with_suffix('.txt')).strip()) for file in files)
    return Examples(pictures, prompts)


def _text(path: Path) -> str:
    if not path.exists():
        return ''
    try:
        return path.read_text('utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{path} cannot be read as text ({error}); expected UTF-8') from error
