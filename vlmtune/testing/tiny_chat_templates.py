r"""Chat templates with the structure of each family's own, oddities included.

The oddities are kept because code that finds loss spans must survive them: LLaVA writes no end token after an answer,
LLaVA-OneVision's generation prompt is not a prefix of the rendered answer (``assistant\n`` against ``assistant \n``),
Qwen3 rewrites earlier answers when a later turn arrives, SmolVLM opens with one ``<|im_start|>`` only.
"""

# The content of a message is a string or a list of parts: {'type': 'text', 'text': ...} or {'type': 'image'}.
_BODY = r"""
{%- macro body(content) -%}
  {%- if content is string -%}{{ content }}{%- else -%}
    {%- for part in content -%}
      {%- if part['type'] == 'image' -%}{{ '@image@' }}{%- endif -%}
      {%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""

_CHATML = r"""
{%- for message in messages -%}
  @default_system@
  {{- '<|im_start|>' + message['role'] + '\n' + body(message['content']) + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

_DEFAULT_SYSTEM = r"""
  {%- if loop.first and message['role'] != 'system' -%}
    {{- '<|im_start|>system\n@system@<|im_end|>\n' -}}
  {%- endif -%}
"""


def _with_body(template: str, *, image: str = '') -> str:
    return _BODY.replace('@image@', image) + template


def chatml(*, image: str = '', system: str | None = None) -> str:
    """ChatML, as Qwen and InternVL write it.

    Args:
        image: what an image part is rendered as.
        system: the system message that is added when the conversation has none; None adds nothing.
    """
    default = '' if system is None else _DEFAULT_SYSTEM.replace('@system@', system)
    return _with_body(_CHATML.replace('@default_system@', default), image=image)


LLAMA3 = _with_body(r"""
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}
  {{- body(message['content']) | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}
""")

INTERNLM2 = '{{- bos_token -}}' + chatml()

QWEN3 = _with_body(r"""
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- set text = body(message['content']) -%}
  {%- set thought = '' -%}
  {%- if message['role'] == 'assistant' and '</think>' in text -%}
    {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
    {%- set text = text.split('</think>')[-1].lstrip('\n') -%}
  {%- endif -%}
  {{- '<|im_start|>' + message['role'] + '\n' -}}
  {%- if message['role'] == 'assistant' and loop.index0 > last.user and (loop.last or thought) -%}
    {{- '<think>\n' + thought + '\n</think>\n\n' -}}
  {%- endif -%}
  {{- text + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{%- endif -%}
""")

LLAVA = r"""
{%- for message in messages -%}
  {%- if message['role'] != 'system' -%}{{ message['role'] | upper + ': ' }}{%- endif -%}
  {%- if message['content'] is string -%}{{ message['content'] + ' ' }}{%- else -%}
    {%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{ '<image>\n' }}{%- endfor -%}
    {%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}{{ part['text'] + ' ' }}{%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""

LLAVA_ONEVISION = r"""
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + ' ' -}}
  {%- if message['content'] is string -%}{{ '\n' + message['content'] }}{%- else -%}
    {%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{ '<image>' }}{%- endfor -%}
    {%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}
      {{- '\n' + part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

SMOLVLM = _with_body(
    r"""
{{- '<|im_start|>' -}}
{%- for message in messages -%}
  {%- set image_first = message['content'] is not string and message['content'][0]['type'] == 'image' -%}
  {{- message['role'] | capitalize + (':' if image_first else ': ') -}}
  {{- body(message['content']) + '<end_of_utterance>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
""",
    image='<image>',
)

GEMMA3 = _with_body(
    r"""
{{- bos_token -}}
{%- set before = namespace(text='') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set before.text = body(message['content']) + '\n\n' -%}
  {%- else -%}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' -}}
    {{- before.text + body(message['content']) | trim + '<end_of_turn>\n' -}}
    {%- set before.text = '' -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
""",
    image='<start_of_image>',
)
