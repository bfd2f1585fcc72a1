from vlmtune.apps.report.differences import differences


def test_differences():
    def marked(answer, *references):
        marks = {'same': '{}', 'extra': '+{}+', 'missing': '-{}-'}
        return ''.join(marks[piece.kind].format(piece.text) for piece in differences(answer, references))

    assert marked('a blue square', 'a blue square') == 'a blue square'
    assert marked('a grey square.', 'a green square') == 'a- green-+ grey+ square+.+'
    assert marked('红色方块', '绿色方块') == '-绿-+红+色方块'
    assert marked('two', 'one', 'two') == 'two'
    assert marked('free') == 'free'
    assert marked('', 'x') == '-x-'
