"""What benchmarks.equality counts as the same tokens, on made-up answers."""

from benchmarks.equality import differences
from jax_engine.request import CompletionOutput, Logprob, RequestMetrics, RequestOutput


def answer(token_ids: list[int], logprobs: dict[int, float]) -> RequestOutput:
    entries = {token: Logprob(value, None, None) for token, value in logprobs.items()}
    completion = CompletionOutput(0, "", token_ids, None, logprobs=[entries] * len(token_ids))
    return RequestOutput("r", None, [1], [completion], True, RequestMetrics(0.0))


def test_a_first_difference_has_to_be_a_near_tie():
    near, apart = {1: -1.0, 2: -1.001, 3: -2.0}, {1: -1.0, 2: -1.5}
    want = [answer([1, 1], near), answer([1, 1], near), answer([1, 1], apart), answer([1, 1], apart)]
    got = [answer([1, 1], near), answer([1, 2], near), answer([2, 1], apart), answer([9, 1], apart)]
    assert differences(want, got) == {"equal": 1, "near_tie": 1, "different": 2}
