"""The settings on the page of the demo, and Gradio itself for all that draws there."""

from typing import TYPE_CHECKING, Any

from vlmtune.apps.chat.answering import generation_settings
from vlmtune.utils.extras import need

if TYPE_CHECKING:
    import gradio as gr
else:
    gr = need('gradio', extra='demo', what='the web demo')

_MOST_TOKENS = 2048


def show_settings(*, system: str, max_new_tokens: int) -> list[Any]:
    """The system message, then the arguments of ``read_settings`` in their order."""
    return [
        gr.Textbox(system, label='System message', elem_id='system', lines=2),
        gr.Slider(1, max(_MOST_TOKENS, max_new_tokens), max_new_tokens, step=1, label='Longest answer (tokens)'),
        gr.Slider(0, 2, 0, step=0.05, label='Temperature', info='0: always the likeliest token'),
        gr.Slider(0.05, 1, 1, step=0.05, label='Top-p', info='with a temperature; 1: no limit'),
        gr.Slider(0, 200, 0, step=1, label='Top-k', info='with a temperature; 0: no limit'),
        gr.Slider(1, 2, 1, step=0.05, label='Repetition penalty', info='1: none'),
        gr.Number(-1, precision=0, label='Seed', info='with a temperature; -1: another answer each time'),
    ]


def read_settings(
    max_new_tokens: float, temperature: float, top_p: float, top_k: float, penalty: float, seed: int | None
) -> tuple[dict[str, Any], int | None]:
    """Settings of ``generate``, and the seed or None. Without a temperature, limits of sampling are passed over.

    Raises:
        ConfigError: a number out of range; browsers can send any.
    """
    limits: dict[str, Any] = dict(top_p=float(top_p), top_k=int(top_k)) if temperature else dict(top_p=None, top_k=None)
    given = generation_settings(
        max_new_tokens=int(max_new_tokens), temperature=float(temperature), repetition_penalty=float(penalty), **limits
    )
    return given, seed if seed is not None and seed >= 0 else None
