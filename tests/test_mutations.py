"""What tests.mutations would break is still there to be broken; that program itself takes too long for every day."""

import pytest

from tests.mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_what_a_mutation_replaces_stands_once(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
