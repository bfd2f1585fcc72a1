from vlmtune.apps.answer_speed import speed_by_size, speed_table


def row(*sizes, seconds=1.0, output_tokens=10):
    return dict(image_sizes=list(sizes), image_tokens=4, prompt_tokens=9, output_tokens=output_tokens, seconds=seconds)


def test_rows_are_classed_by_the_area_of_their_pictures():
    rows = [
        row((256, 256)),
        row((257, 256)),
        row((512, 128), seconds=3.0),
        row(),
        row((5000, 4000)),
        row((200, 200), (200, 200)),
    ]
    found = {one['size']: one['samples'] for one in speed_by_size(rows)}
    assert found == {'none': 1, 'to 256 x 256': 2, 'to 512 x 512': 2, 'over 4096 x 4096': 1}
    assert list(found) == ['none', 'to 256 x 256', 'to 512 x 512', 'over 4096 x 4096']


def test_means_are_per_sample_and_the_rate_is_that_of_all():
    (one,) = speed_by_size([row((10, 10), seconds=1.0, output_tokens=30), row((10, 10), seconds=3.0, output_tokens=10)])
    assert (one['seconds'], one['output_tokens'], one['tokens_per_second']) == (2.0, 20.0, 10.0)
    assert (one['image_tokens'], one['prompt_tokens']) == (4.0, 9.0)


def test_the_table_has_a_line_per_class_in_columns():
    lines = speed_table(speed_by_size([row((10, 10)), row((3000, 2000), seconds=12.5)])).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[-2:] == ['12.5000', '0.8']


def test_no_rows_make_no_table():
    assert speed_by_size([]) == []
    assert len(speed_table([]).splitlines()) == 1
