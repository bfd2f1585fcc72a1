"""System messages by name, for ``vlmtune chat --system-template``.

The names are XTuner's, the words are not: a model that was trained with certain words wants those, see ``--system``.
"""

from vlmtune.apps.chat.session import text_or_file
from vlmtune.utils.errors import ConfigError
from vlmtune.utils.suggest import did_you_mean

SYSTEM_TEMPLATES = {
    'alpaca': 'You are given an instruction. Write an answer that does what it asks for.',
    'arxiv_gentile': 'You know how papers are written. Suggest a title for the paper whose abstract you are given.',
    'coder': 'You are {bot_name}, an experienced programmer. Answer with code that does what is asked for.',
    'colorist': 'You are a designer who works with colours. Suggest colours that fit the description you are given.',
    'lawyer': '你是{bot_name}，一位熟悉中国法律的律师。请准确地回答问题，并说明所依据的法律条文。',
    'medical': '你是{bot_name}，一位医生。请根据患者描述的情况，用通俗的语言回答问题。',
    'sql': 'You are given CREATE TABLE statements and a question. Answer with one SQL query.',
}


def find_system(
    *, system: str | None = None, system_template: str | None = None, bot_name: str | None = None
) -> str | None:
    """The system message, or None.

    Args:
        system: its words; those of a file where ``@FILE`` is given.
        system_template: a name in ``SYSTEM_TEMPLATES``.
        bot_name: takes the place of ``{bot_name}`` in either.

    Raises:
        ConfigError: both are given, or there is no such name.
    """
    if system is not None and system_template is not None:
        raise ConfigError('--system and --system-template are two system messages; give one of them')
    if system_template is not None:
        if system_template not in SYSTEM_TEMPLATES:
            near = did_you_mean(system_template, SYSTEM_TEMPLATES)
            names = ', '.join(SYSTEM_TEMPLATES)
            raise ConfigError(f'--system-template {system_template} does not exist{near}; there are {names}')
        system = SYSTEM_TEMPLATES[system_template]
    elif system is not None:
        system = text_or_file(system, option='--system')
    return None if system is None else system.replace('{bot_name}', bot_name or 'the assistant')
