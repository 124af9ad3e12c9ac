"""Which compiled size a step takes."""

import pytest

from jax_engine.buckets import Bucket, choose_bucket
from tests.scheduling import make_limits


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 2), (3, 4), (4, 4)])
def test_decodes_take_the_smallest_size_that_holds_them(rows, size):
    assert choose_bucket(make_limits(), rows, rows, rows) == Bucket(size, size, True)


@pytest.mark.parametrize(("tokens", "size"), [(2, 8), (8, 8), (9, 16), (16, 16)])
def test_steps_with_prompts_take_the_smallest_that_holds_their_tokens(tokens, size):
    assert choose_bucket(make_limits(), tokens, 0, 1) == Bucket(size, 4, False)


def test_steps_without_prompts_take_those_too_where_there_are_none_for_decodes():
    assert choose_bucket(make_limits(decode_buckets=()), 3, 3, 3) == Bucket(8, 4, False)
