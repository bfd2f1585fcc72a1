"""What is known of a way in which checkpoints lie on disk, other than that of transformers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from vlmtune.layouts.names import NameMap, Rule

if TYPE_CHECKING:
    from vlmtune.layouts.weights import Weight


@dataclass(frozen=True)
class Layout:
    """A layout: how its files are read as those of the model class that trains it.

    *Native* is what that class takes, be it one of transformers or one of ours. The files of the original are data: no
    code in them is run.

    Attributes:
        name: for messages.
        read_config: the parsed config.json of the original -> the native config. Raises ModelError for what it does not
            know: another version, a language model that has no native class.
        write_processor_files: (source, target): reads the original's folder and writes, in the form that transformers
            reads, the files of tokenizer and image processor: tokenizer.json, tokenizer_config.json,
            chat_template.jinja, preprocessor_config.json, processor_config.json. Raises ModelError for what is missing
            or does not fit.
        rules: native config -> how names correspond.
        kept: patterns of tensors of the original that the native model does not hold; an export copies them.
        open_weights: of a folder, where its weights do not lie in it.
        serving: how engines serve such a checkpoint, in Markdown, for the model card.
        image_token: the token that stands for image features, where config.json does not say its id: it becomes
            ``image_token_id`` of the native config.
    """

    name: str
    read_config: Callable[[Mapping[str, Any]], PreTrainedConfig]
    write_processor_files: Callable[[Path, Path], None]
    rules: Callable[[PreTrainedConfig], Sequence[Rule]]
    kept: tuple[str, ...] = ()
    open_weights: 'Callable[[Path], Mapping[str, Weight]] | None' = None
    serving: str = ''
    image_token: str | None = None

    def name_map(self, config: PreTrainedConfig) -> NameMap:
        """The names of a model with this native config."""
        return NameMap(self.rules(config), kept=self.kept)
