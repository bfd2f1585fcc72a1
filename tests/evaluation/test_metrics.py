import pytest

from vlmtune.evaluation import exact_match


def test_exact_match_is_the_share_of_equal_answers():
    assert exact_match(['red', ' blue\n', 'Red', ''], ['red', 'blue', 'red', 'x']) == 0.5


@pytest.mark.parametrize(('predictions', 'references'), [([], []), (['a'], ['a', 'b'])])
def test_unequal_or_empty_lists_are_refused(predictions, references):
    with pytest.raises(ValueError, match='predictions for'):
        exact_match(predictions, references)
