import pytest
from PIL import Image

from vlmtune.apps.chat.session import ChatSession, Example, read_examples
from vlmtune.structures import ImageRef
from vlmtune.utils.errors import ConfigError, DataError


@pytest.fixture
def images(tmp_path):
    for name in ('a.png', 'b.png', 'c.png'):
        Image.new('RGB', (60, 40)).save(tmp_path / name)
    return [str(tmp_path / name) for name in ('a.png', 'b.png', 'c.png')]


def shape(conversation):
    return [(message.role, message.image_indices, message.text) for message in conversation.messages]


def test_images_go_with_the_next_message_in_any_turn(images):
    session = ChatSession()
    assert session.add_image(images[0]) == (40, 60)
    first = session.ask('one')
    session.record(first, 'answer one')
    second = session.ask('two')
    session.record(second, 'answer two')
    session.add_image(images[1])
    session.add_image(images[2])
    assert shape(session.ask('three')) == [
        ('user', (0,), 'one'),
        ('assistant', (), 'answer one'),
        ('user', (), 'two'),
        ('assistant', (), 'answer two'),
        ('user', (1, 2), 'three'),
    ]
    assert session.ask('three').images == tuple(ImageRef(path=image) for image in images)


def test_a_question_becomes_history_only_once_it_is_answered(images):
    session = ChatSession()
    session.add_image(images[0])
    session.ask('lost')
    asked = session.ask('kept')
    assert shape(asked) == [('user', (0,), 'kept')]
    session.record(asked, 'yes')
    assert session.waiting == ()
    assert shape(session.history) == [('user', (0,), 'kept'), ('assistant', (), 'yes')]


def test_clear_forgets_all_but_the_system_message(images):
    session = ChatSession(system='Be brief.')
    session.add_image(images[0])
    session.record(session.ask('one'), 'answer')
    session.add_image(images[1])
    session.clear()
    asked = session.ask('two')
    assert shape(asked) == [('system', (), 'Be brief.'), ('user', (), 'two')]
    assert asked.images == ()


@pytest.mark.parametrize(
    ('name', 'match'),
    [('none.png', 'no image file at'), ('text.png', 'not an image file'), ('cut.png', 'image cannot be read')],
)
def test_a_bad_image_leaves_the_session_as_it_was(tmp_path, images, name, match):
    (tmp_path / 'text.png').write_text('not an image')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'a.png').read_bytes()[:-30])
    session = ChatSession()
    session.add_image(images[0])
    with pytest.raises(DataError, match=match):
        session.add_image(str(tmp_path / name))
    assert session.ask('one').images == (ImageRef(path=images[0]),)


def test_a_text_model_takes_no_image(images):
    with pytest.raises(DataError, match='text model'):
        ChatSession(takes_images=False).add_image(images[0])


# ---- examples


def test_examples_stand_after_the_system_message_and_survive_clear(images):
    examples = (Example(images[0], 'Read.', 'one'), Example('', 'And now?', 'two'))
    session = ChatSession(system='Be brief.', examples=examples)
    before = [
        ('system', (), 'Be brief.'),
        ('user', (0,), 'Read.'),
        ('assistant', (), 'one'),
        ('user', (), 'And now?'),
        ('assistant', (), 'two'),
    ]
    session.add_image(images[1])
    asked = session.ask('Read.')
    assert shape(asked) == [*before, ('user', (1,), 'Read.')]
    assert [image.path for image in asked.images] == images[:2]
    session.record(asked, 'three')
    session.clear()
    assert shape(session.history) == before
    assert session.waiting == ()


def test_texts_of_examples_come_from_files_and_the_prompt(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text('# Titel\n', encoding='utf-8')
    given = [['a.png', '', f'@{page}'], ['', 'Why?', 'So.']]
    assert read_examples(given, prompt='Read.') == (Example('a.png', 'Read.', '# Titel\n'), Example('', 'Why?', 'So.'))


@pytest.mark.parametrize(
    ('given', 'error', 'match'),
    [
        (['a.png', '', 'x'], ConfigError, "question '' stands for that of --prompt"),
        (['a.png', 'Read.', ' '], ConfigError, 'empty answer'),
        (['a.png', 'Read.', '@/no/such/file.md'], DataError, r'--example @/no/such/file.md: no text can be read from'),
    ],
)
def test_a_bad_example(given, error, match):
    with pytest.raises(error, match=match):
        read_examples([given], prompt=None)


def test_an_image_of_an_example_must_exist():
    with pytest.raises(DataError, match='no image file at'):
        ChatSession(examples=[Example('none.png', 'Read.', 'x')])
