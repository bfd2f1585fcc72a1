"""Named chat templates, for bare language models and for checkpoints whose own template never ends an answer.

Each is a Jinja template that takes message contents as strings or as lists of parts and supports
``add_generation_prompt``. ``prompt_template = None`` in a recipe keeps the model's own template, which is the default.
"""

from vlmtune.utils.errors import ConfigError
from vlmtune.utils.suggest import did_you_mean

# Writes one message's content; IMAGE is what the family's marker of an image is.
_CONTENT = (
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}"
    '{% endfor %}{% endif %}'
)


def _turns(before: str = '', *, image: str = '<image>\n', **role_formats: tuple[str, str]) -> str:
    """A template that writes ``before``, then every message between the two strings of its role."""
    content = _CONTENT.replace('IMAGE', image)
    branches = ''.join(
        f"{{% {'if' if i == 0 else 'elif'} m['role'] == '{role}' %}}{head}{content}{tail}"
        for i, (role, (head, tail)) in enumerate(role_formats.items())
    )
    prompt = role_formats['assistant'][0].rstrip(' ')
    template = (
        f'{before}{{% for m in messages %}}{branches}{{% endif %}}{{% endfor %}}'
        f'{{% if add_generation_prompt %}}{prompt}{{% endif %}}'
    )
    return template.replace('\n', "{{ '\\n' }}")  # a bare line break behind a block would be dropped


def _chatml(before: str = '', **kwargs: str) -> str:
    roles = {role: (f'<|im_start|>{role}\n', '<|im_end|>\n') for role in ('system', 'user', 'assistant')}
    return _turns(before, **roles, **kwargs)  # type: ignore[arg-type]


# One question and one answer: images, bos, the question and a line break, which the answer follows at once.
_PALIGEMMA = """
{%- if messages | rejectattr('role', 'equalto', 'system') | list | length > 2 -%}
  {{- raise_exception('the model takes one question and one answer; make a row of each turn') -}}
{%- endif -%}
{%- set row = namespace(images='', question='', answer='') -%}
{%- for m in messages -%}
  {%- set parts = [{'type': 'text', 'text': m['content']}] if m['content'] is string else m['content'] -%}
  {%- for p in parts -%}
    {%- if p['type'] == 'image' -%}{%- set row.images = row.images + '<image>' -%}
    {%- elif m['role'] == 'assistant' -%}{%- set row.answer = row.answer + p['text'] -%}
    {%- else -%}{%- set row.question = row.question + p['text'] -%}{%- endif -%}
  {%- endfor -%}
  {%- if m['role'] == 'system' -%}{%- set row.question = row.question + '\\n' -%}{%- endif -%}
{%- endfor -%}
{{- row.images + bos_token + row.question + '\\n' -}}
{%- if messages[-1]['role'] == 'assistant' -%}{{- row.answer | trim + eos_token -}}{%- endif -%}
"""

TEMPLATES: dict[str, str] = {
    'chatml': _chatml(),
    'internlm2_chat': _chatml('{{ bos_token }}'),
    'qwen_vl': _chatml(image='<|vision_start|><|image_pad|><|vision_end|>'),
    'internvl': _chatml(image='<IMG_CONTEXT>\n'),
    'points': _chatml(image='<|vision_start|><|image_pad|><|vision_end|>\n'),
    'vicuna': _turns(
        '{{ bos_token }}',
        system=('', ' '),
        user=('USER: ', ' '),
        assistant=('ASSISTANT: ', '{{ eos_token }}'),
    ),
    'llama3_chat': _turns(
        '{{ bos_token }}',
        system=('<|start_header_id|>system<|end_header_id|>\n\n', '<|eot_id|>'),
        user=('<|start_header_id|>user<|end_header_id|>\n\n', '<|eot_id|>'),
        assistant=('<|start_header_id|>assistant<|end_header_id|>\n\n', '<|eot_id|>'),
    ),
    'alpaca': _turns(
        '{{ bos_token }}',
        system=('', '\n\n'),
        user=('### Instruction:\n', '\n\n'),
        assistant=('### Response:\n', '{{ eos_token }}\n\n'),
    ),
    'paligemma': _PALIGEMMA.strip(),
}
JOINT_TEMPLATES: dict[str, str] = {
    TEMPLATES['paligemma']: TEMPLATES['paligemma'].replace(
        "row.images + bos_token + row.question + '\\n'", 'row.images + row.question'
    ),
}
"""What stands for a template where transformers' processor of text and images writes a part of the prompt itself."""


def find_template(name: str) -> str:
    """The Jinja text of a named template.

    Raises:
        ConfigError: no such name; the nearest is named.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    hint = did_you_mean(name, TEMPLATES)
    raise ConfigError(f'prompt_template {name!r} does not exist{hint}; there are {", ".join(TEMPLATES)}, or None')
