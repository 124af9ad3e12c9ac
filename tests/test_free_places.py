"""Free places for small arrays. That they keep temporaries in place on a GPU is measured by benchmarks.steps."""

import jax

from jax_engine.free_places import PLACES, SIZES, leave_free


def test_every_place_is_bounded_by_an_array_of_its_size_that_is_kept():
    """The allocator gives arrays of one size one after the other, so what is kept lies between what is given back."""
    made = []

    def put(array):
        made.append(jax.device_put(array))
        return made[-1]

    kept = leave_free(put)
    assert [array.nbytes for array in kept] == [size for size in SIZES for _ in range(PLACES)]
    assert [any(array is other for other in kept) for array in made] == [False, True] * (len(made) // 2)
    assert sum(array.nbytes for array in kept) < 65 << 20
