"""``vlmtune chat``: one question, or a conversation at the terminal."""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from vlmtune.apps.chat.answering import generation_settings, load_answerer
from vlmtune.apps.chat.boxes import check_drawing, report_boxes
from vlmtune.apps.chat.llava_folder import llava_parts
from vlmtune.apps.chat.session import ChatSession, read_examples
from vlmtune.apps.chat.system_templates import find_system
from vlmtune.apps.chat.terminal import Terminal, say_answer
from vlmtune.utils.errors import ConfigError


def chat(
    model: str,
    *,
    adapter: str | None = None,
    llava: str | None = None,
    visual_encoder: str | None = None,
    visual_select_layer: int = -2,
    images: Sequence[str] = (),
    prompt: str | None = None,
    system: str | None = None,
    system_template: str | None = None,
    prompt_template: str | None = None,
    bot_name: str | None = None,
    examples: Sequence[Sequence[str]] = (),
    stop_words: Sequence[str] = (),
    no_streamer: bool = False,
    max_new_tokens: int = 512,
    temperature: float | None = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    bits: int | None = None,
    offload_folder: str | None = None,
    boxes: bool = False,
    draw_boxes: str | None = None,
) -> None:
    """Answer one question, or talk.

    With ``prompt``, the answer and nothing else goes to standard output. Without it, lines are read from standard
    input until its end or ``/exit``.

    Args:
        model: a folder or a hub id; the folder of an adapter means its base and the adapter.
        adapter: a PEFT adapter on top of it; its processor files win over the model's.
        llava: a folder of XTuner with a projector for ``model``, which is then a language model.
        visual_encoder: folder or hub id of the vision encoder of ``llava``.
        visual_select_layer: of it; its output is what the projector reads.
        images: files that are shown with the first message.
        prompt: the question.
        system: system message; ``@FILE`` is the text in that file.
        system_template: the name of one, see ``system_templates``.
        prompt_template: a name in ``vlmtune.data.templates``, for models without a chat template.
        bot_name: ``{bot_name}`` in system messages, and what stands before answers at a terminal.
        examples: image, question and answer of each turn that is shown before (few-shot), see ``read_examples``.
        stop_words: texts that end an answer, which is cut before them.
        no_streamer: print answers when they are complete.
        max_new_tokens: of an answer.
        temperature: 0 or None is greedy.
        top_p: None or 1 is no limit.
        top_k: None or 0 is no limit.
        repetition_penalty: None or 1 is none.
        seed: makes sampled answers repeatable.
        bits: 4 or 8 loads the language model quantised.
        offload_folder: weights that fit neither the device nor the memory go into files there.
        boxes: print the boxes of every answer, in pixels of the last image shown.
        draw_boxes: image file into which the boxes of the latest answer are drawn.

    Raises:
        UserError: the model cannot be loaded, an image cannot be read, or ``draw_boxes`` cannot be written.
    """
    if draw_boxes is not None:
        check_drawing(draw_boxes)
    settings = generation_settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        stop_words=stop_words,
    )
    start: dict[str, Any] = dict(
        system=find_system(system=system, system_template=system_template, bot_name=bot_name),
        examples=read_examples(examples, prompt=prompt),
    )
    _begin(images, **start)  # finds a bad image before the model is loaded, which takes a while
    source: Any = model
    if llava is not None or visual_encoder is not None:
        if adapter is not None:
            raise ConfigError('--adapter and --llava: a LLaVA of XTuner brings its own adapters; give one of the two')
        source = llava_parts(model, llava=llava, visual_encoder=visual_encoder, visual_select_layer=visual_select_layer)
    answerer = load_answerer(
        source,
        adapter=adapter,
        bits=bits,
        prompt_template=prompt_template,
        offload_folder=offload_folder,
        settings=settings,
    )
    session = _begin(images, takes_images=answerer.processor.family.has_vision, **start)
    if seed is not None:
        torch.manual_seed(seed)
    report = functools.partial(report_boxes, processor=answerer.processor, show=boxes, draw_to=draw_boxes)
    if prompt is not None:
        asked = session.ask(prompt)
        report(say_answer(answerer, asked, stream=not no_streamer), asked=asked)
        return
    Terminal(session, answerer, report=report, stream=not no_streamer, bot_name=bot_name).run()


def _begin(images: Sequence[str], **session: Any) -> ChatSession:
    begun = ChatSession(**session)
    for image in images:
        begun.add_image(image)
    return begun
