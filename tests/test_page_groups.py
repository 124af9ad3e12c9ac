"""Groups of layers that share the pages: contexts cost what is seen of them, and nobody's answers change."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jax_engine.config import Limits
from jax_engine.model_config import LayerConfig, ModelConfig
from jax_engine.page_groups import PageGroups
from jax_engine.page_pool import PagePool
from jax_engine.request import FinishReason
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.scheduler import Scheduler
from jax_engine.sequence import NO_PAGE
from tests.scheduling import make_limits, make_sequence

TINY = Path(__file__).parent / "golden/tiny"
#: Models with windows, and a pool that two or three sequences join but that does not hold them to their end.
PAGES = {"gemma2": 60, "gemma3": 152, "gpt_oss": 60, "mistral": 119, "smollm3": 50}


@given(
    window=st.integers(1, 40),
    log_page_size=st.integers(0, 4),
    step_tokens=st.integers(1, 50),
    start=st.integers(0, 200),
    count=st.integers(1, 50),
)
def test_what_is_kept_is_what_a_step_needs(window, log_page_size, step_tokens, start, count):
    groups, size = PageGroups(1, 1, window), 1 << log_page_size
    count = min(count, step_tokens)
    first = groups.first_kept(start, size)
    assert first == 0 or first * size <= start - window + 1, "a page that the next token sees is given back"
    assert first == 0 or (first + 1) * size <= start, "the page that stands for others is not full"
    last = (start + count - 1) // size
    assert last < first + groups.span(size, step_tokens), "a step adds more than a table holds"
    assert groups.num_kept(start, size) == -(-start // size) * 2 - first


@given(pages=st.integers(8, 200), groups=st.sampled_from([PageGroups(), PageGroups(1, 3, 10), PageGroups(2, 1, 30)]))
def test_the_longest_sequence_is_the_longest_that_fits(pages, groups):
    longest = groups.most_tokens(pages, 4, 8)
    assert groups.most_pages(longest, 4, 8) <= pages < groups.most_pages(longest + 1, 4, 8)


def shape(*windows: int | None) -> ModelConfig:
    """A model whose layers have these windows."""
    layers = tuple(LayerConfig(sliding_window=window) for window in windows)
    return dataclasses.replace(ModelConfig.placeholder(2, 2**20), num_hidden_layers=len(layers), layers=layers)


GEMMA3_27B = [None if number % 6 == 0 else 1024 for number in range(1, 63)]


@pytest.mark.parametrize(
    ("windows", "groups", "layers_per_page"),
    [
        ([None] * 5, PageGroups(), 5),
        (GEMMA3_27B, PageGroups(1, 6, 1024), 10),
        ([128, None] * 12, PageGroups(1, 1, 128), 12),
        ([64, None, None, None] * 4, PageGroups(3, 1, 64), 4),
        ([None, 7, 9], PageGroups(1, 2, 9), 1),
        ([4096] * 32, PageGroups(1, 8, 4096), 4),
    ],
)
def test_layers_form_groups_of_one_size(windows, groups, layers_per_page):
    model = shape(*windows)
    assert model.page_groups == groups and model.layers_per_page == layers_per_page
    assert len(set(model.places)) == len(windows), "two layers in one place"
    for window, (group, number) in zip(windows, model.places, strict=True):
        assert (window is not None) == (group >= groups.num_full) and group < groups.num and number < layers_per_page


def test_a_window_that_holds_the_longest_sequence_is_none():
    assert shape(100, None).served(100).page_groups == PageGroups()
    assert shape(100, None).served(101).page_groups == PageGroups(1, 1, 100)


def test_a_long_context_costs_what_is_seen_of_it():
    """The numbers of docs/scheduling.md: pages of ten layers, where without groups each page had all 62."""
    model = shape(*GEMMA3_27B)
    limits = make_limits(
        max_model_len=2**16, max_num_batched_tokens=2048, token_buckets=(2048,), page_size=64, num_pages=4000,
        page_groups=model.page_groups, max_inflight_steps=1,
    )  # fmt: skip
    scheduler = Scheduler(limits)
    sequence = make_sequence([1] * 32_000, 1000, stop=False)
    scheduler.add(sequence)
    used = []
    while scheduler.has_work:
        scheduler.commit(scheduler.schedule(), [1])
        scheduler.check()
        used.append(limits.num_pages - scheduler.pool.num_free)
    assert used[:2] == [500 + 6 * 49] * 2, "a prompt holds its window, and what a step adds to it"
    assert len(sequence.token_ids) == 33_000 and used[-2] == 516 + 6 * 17
    with_groups, without = used[-2] * 10, 516 * 62
    assert with_groups / without == pytest.approx(0.193, abs=1e-3)


def make_pool(num_pages: int = 64) -> PagePool:
    return PagePool(num_pages, 4, True, PageGroups(1, 2, 6), 8)


def compute(pool: PagePool, sequence, num_tokens: int, step: int = 8) -> None:
    """As the scheduler does: pages, then tokens, then the index."""
    while sequence.num_computed < num_tokens:
        pool.grow(sequence, pool.pages_for(num_tokens))
        sequence.num_computed = min(sequence.num_computed + step, num_tokens, sequence.num_places)
        pool.index(sequence, sequence.num_computed)
        pool.check([sequence])


def test_a_found_beginning_ends_where_its_window_is_there():
    pool = make_pool()
    prompt = list(range(40))
    first = make_sequence(prompt, 1)
    compute(pool, first, 40)
    last = first.tables[2][-1]
    pool.release(first)
    found = pool.match(make_sequence(prompt, 1), 40)
    assert [page == NO_PAGE for page in found[1]] == [True] * 8 + [False] * 2 and len(found[0]) == 10
    pool._forget(last)
    found = pool.match(make_sequence(prompt, 1), 40)
    assert [len(table) for table in found] == [9] * 3 and found[1][:7] == [NO_PAGE] * 7 and NO_PAGE not in found[1][7:]
    for page in list(pool._unused):
        if len(pool._contents[page].key) > 16:  # a page of a sliding group
            pool._forget(page)
    assert pool.match(make_sequence(prompt, 1), 40) == [[], [], []]
    pool.check([])


def test_what_a_failed_sequence_gave_back_is_not_found_either():
    pool = make_pool()
    sequence = make_sequence(list(range(40)), 1)
    compute(pool, sequence, 40)
    assert sequence.num_dropped == 6 and pool.num_indexed == 30
    pool.forget(sequence)
    assert pool.num_indexed == 0
    pool.check([sequence])


def test_a_prompt_whose_window_cannot_move_on_goes_as_far_as_its_pages():
    """Pages found in another's window do not come back with one's own; without others, a chunk is cut."""
    cut = 0
    for spare_pages in range(40):
        limits = make_limits(
            page_groups=PageGroups(1, 2, 20), max_model_len=128, max_num_batched_tokens=8, max_inflight_steps=1,
            fill_buckets=False,
        )  # fmt: skip
        scheduler = Scheduler(dataclasses.replace(limits, num_pages=limits.full_pages + spare_pages))
        prompts = [[1] * 40 + [2] * count for count in (0, 60, 50)]
        sequences = [make_sequence(prompt, 124 - len(prompt), stop=False) for prompt in prompts]
        for sequence in sequences:
            scheduler.add(sequence)
        while scheduler.has_work:
            schedule = scheduler.schedule()
            scheduler.check()
            assert schedule.rows, "nobody gets on"
            for sequence, start, count, samples in schedule.rows:
                assert start + count <= sequence.num_places
                cut += not samples and schedule.num_tokens < 8 and count < 8
            scheduler.commit(schedule, [1] * len(schedule.rows))
        assert all(len(sequence.token_ids) == 124 for sequence in sequences)
    assert cut, "no pool was small enough to show anything"


# On tiny real models.


class Golden:
    """A model with windows, compiled once, and what transformers says of three sequences."""

    def __init__(self, architecture: str, make_modes):
        self.modes = make_modes(
            model=str(TINY / architecture), page_size=4, max_num_seqs=3, token_buckets=(16,), decode_buckets=(),
            num_pages=700, swap_space_gib=0.01,
        )  # fmt: skip
        self.num_pages = PAGES[architecture]
        expected = np.load(TINY / architecture / "expected.npz")
        self.tokens, self.greedy = expected["tokens"].tolist(), expected["greedy"].tolist()


@pytest.fixture(scope="module", params=PAGES)
def golden(request, make_modes) -> Golden:
    return Golden(request.param, make_modes)


PARAMS = SamplingParams(
    temperature=0, max_tokens=72, logprobs=3, ignore_eos=True, repetition_penalty=1.0,
    output_kind=RequestOutputKind.FINAL_ONLY,
)  # fmt: skip


def serve(engine, prompts, params=PARAMS) -> list:
    for number, prompt in enumerate(prompts):
        engine.submit(engine.make_request(str(number), prompt, params))
    outputs = {}
    while engine.has_work:
        outputs |= {output.request_id: output for output in engine.step()}
        engine.scheduler.check()
    assert engine.scheduler.pool.num_free == engine.limits.num_pages
    return [outputs[str(number)] for number in range(len(prompts))]


@pytest.fixture(scope="module")
def alone(golden) -> list:
    """Each sequence alone, the host waiting for each step, in a pool with room."""
    return [serve(golden.modes.engine("sync"), [prompt])[0] for prompt in golden.tokens]


def test_tokens_are_those_of_another_implementation(golden, alone):
    assert golden.modes.limits.page_groups.num_sliding
    for output, want in zip(alone, golden.greedy, strict=True):
        (completion,) = output.outputs
        for got, token, entries in zip(completion.token_ids[: len(want)], want, completion.logprobs, strict=False):
            if got != token:
                assert entries[got].logprob - entries[token].logprob < 0.02, "another token, and no near-tie"
                break


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("caching", [True, False])
def test_a_pool_that_is_too_small_changes_no_bit(golden, alone, mode, caching):
    engine = golden.modes.engine(
        "async", 3, num_pages=golden.num_pages, preemption_mode=mode, enable_prefix_caching=caching
    )
    outputs = serve(engine, golden.tokens)
    assert engine.metrics.preemptions > 0
    assert [output.outputs for output in outputs] == [output.outputs for output in alone]


def test_found_windows_change_no_bit(golden, alone):
    engine = golden.modes.engine("async", 2)
    for _ in range(2):
        got = [serve(engine, [prompt])[0] for prompt in golden.tokens]
        assert [output.outputs for output in got] == [output.outputs for output in alone]
    assert [output.num_cached_tokens for output in got] == [44] * 3
    # The answer too is found, and what follows it is computed from it.
    longer = [prompt + output.outputs[0].token_ids[:40] for prompt, output in zip(golden.tokens, alone, strict=True)]
    params = dataclasses.replace(PARAMS, max_tokens=32)
    for output, want in zip(serve(engine, longer, params), alone, strict=True):
        assert output.num_cached_tokens == 84
        assert output.outputs[0].token_ids == want.outputs[0].token_ids[40:]


def test_penalties_see_what_windows_have_passed(golden):
    params = dataclasses.replace(PARAMS, repetition_penalty=1.8, frequency_penalty=0.5)
    want = [serve(golden.modes.engine("sync"), [prompt], params)[0].outputs for prompt in golden.tokens]
    got = serve(golden.modes.engine("async", 3, num_pages=golden.num_pages), golden.tokens, params)
    assert [output.outputs for output in got] == want
    tokens = want[0][0].token_ids
    assert len(set(tokens)) > len(tokens) // 2, "penalties that change nothing show nothing"


def test_a_poisoned_window_fails_one_request(golden, alone):
    engine, prompt = golden.modes.engine("async", 2), golden.tokens[0]
    serve(engine, [prompt])
    key = list(engine.scheduler.pool._index)[-1]
    assert len(key) > 16, "a page of a sliding group"
    page, runner = engine.scheduler.pool._index[key], golden.modes.runner
    with jax.transfer_guard("allow"):
        runner._cache = dataclasses.replace(runner._cache, pool=runner._cache.pool.at[page].set(np.nan))
    longer = prompt + alone[0].outputs[0].token_ids[:-1]
    assert serve(engine, [longer])[0].outputs[0].finish_reason is FinishReason.ERROR
    again = serve(engine, [prompt])[0]
    assert again.outputs == alone[0].outputs and again.num_cached_tokens == 0


def test_limits_count_pages_of_all_groups():
    limits: Limits = make_limits(page_groups=PageGroups(1, 2, 6), max_num_batched_tokens=8)
    assert limits.full_pages == 16 + 2 * 5 and limits.tokens_in(52) == 128
    assert limits.most_tokens(26) == 64 and limits.most_tokens(25) == 60
