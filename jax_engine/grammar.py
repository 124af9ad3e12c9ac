"""Grammars: structured outputs compiled by llguidance, and the state of each sequence that has one.

`Engine.make_request` compiles, in any thread; the engine's thread advances the states with accepted tokens and fills
the masks of a step. Masks are numpy: bit `id % 32` of word `id // 32` says whether a token may be chosen. Never imports
jax.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence as AbstractSequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import llguidance
import numpy as np
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from jax_engine.errors import InvalidRequest
from jax_engine.schedule import Row
from jax_engine.sequence import Sequence, Status
from jax_engine.structured_outputs import WHITESPACE, StructuredOutputsParams
from jax_engine.tokenizer import Tokenizer

#: Compiled grammars kept for the next request with the same one.
_CACHE_SIZE = 64
#: Threads that make masks: more gained nothing on 32 cores. Lexers of one grammar: two for each thread, so that few
#: threads meet at one.
_THREADS = max(1, min(8, (os.cpu_count() or 1) * 4 // 5))
_MAX_LEXERS = 2 * _THREADS
#: Masks that are made at once by the engine's thread, in less time than it takes to wake another.
_FEW = 4
#: Bounds on one compilation and on one mask, in llguidance's units: 50,000 and 14,000 a millisecond, about.
_COMPILE_FUEL = 5_000_000
_STEP_FUEL = 500_000
_MAX_GRAMMAR_SYMBOLS = 200_000
#: Sets of tokens that a mask takes in whole, where all of a set fits, instead of walking through them: white space, and
#: text of JSON strings by length. The short ones serve strings that may go on for a few characters only (maxLength),
#: where a walk took 2 to 4 ms at 152,000 tokens.
_TEXT = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [r"[\x20\x0A\x0D\x09]+", *(f"{_TEXT}{{1,{most}}}" for most in (2, 4, 6, 8, 10, 30)), f"{_TEXT}+"]
_PARAM = "structured_outputs"


class GrammarState(NamedTuple):
    """Where one sequence stands in its grammar. States with the same `lexer` are advanced one at a time."""

    matcher: llguidance.LLMatcher
    lexer: tuple[int, int]


class Grammar:
    """A compiled grammar in its first state, shared by requests.

    The copies of a matcher share its lexer, whose lock lets one of them make a mask at a time. So a grammar that more
    sequences ask for is compiled again, until there are lexers enough for all threads.

    Args:
        compile: gives a matcher in its first state, with a lexer of its own.
    """

    def __init__(self, compile: Callable[[], llguidance.LLMatcher]):
        self._compile = compile
        self._matchers = [compile()]
        self._num_wanted = 0
        self._starts = itertools.count()

    def prepare(self, num_sequences: int) -> None:
        """Makes lexers for so many more sequences; any thread. Two at once may make one too many: no harm."""
        self._num_wanted += num_sequences
        while len(self._matchers) < min(self._num_wanted, _MAX_LEXERS):
            self._matchers.append(self._compile())

    def start(self) -> GrammarState:
        """A state of its own for one sequence. Engine thread only."""
        index = next(self._starts) % len(self._matchers)
        return GrammarState(self._matchers[index].deep_copy(), (id(self), index))


class GrammarCompiler:
    """Compiles grammars for one vocabulary; safe to call from several threads.

    Args:
        tokenizer: gives each token's bytes. vocab_size: of the model; ids that are no token are never allowed.
        eos_token_ids: allowed where the output may end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]):
        self._vocabulary = tokenizer, vocab_size, sorted(eos_token_ids)
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=_COMPILE_FUEL,
            step_lexer_fuel=_STEP_FUEL,
            max_grammar_size=_MAX_GRAMMAR_SYMBOLS,
            verbose_errors=False,
        )
        self._grammar = functools.lru_cache(_CACHE_SIZE)(self._new_grammar)

    @functools.cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        """Made for the first request that needs it: reading a large vocabulary takes a second."""
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(*self._vocabulary))
        return llguidance.LLTokenizer(wrapper, eos_token=self._vocabulary[2], slices=_SLICES)

    def compile(self, params: StructuredOutputsParams, num_sequences: int = 1) -> Grammar:
        """The grammar of what a request asks for, ready for so many sequences of it.

        Raises:
            InvalidRequest: it is malformed, can never be matched, or takes too long.
        """
        grammar = self._grammar(params)
        grammar.prepare(num_sequences)
        return grammar

    def _new_grammar(self, params: StructuredOutputsParams) -> Grammar:
        return Grammar(functools.partial(self._matcher, _source(params)))

    def _matcher(self, source: str) -> llguidance.LLMatcher:
        if not self._vocabulary[2]:
            raise InvalidRequest("the model has no token that ends an output: it cannot be structured", _PARAM)
        matcher = llguidance.LLMatcher(self._tokenizer, source, limits=self._limits, log_level=0)
        if matcher.is_error():
            raise InvalidRequest(f"structured_outputs: {_first_line(matcher.get_error())}", _PARAM)
        return matcher


class _Vocabulary:
    """The tokens as llguidance wants to see them."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]):
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(tokenizer.special_token_ids)
        known = min(vocab_size, tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(i) for i in range(known)] + [b""] * (vocab_size - known)

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)


def _source(params: StructuredOutputsParams) -> str:
    """What a request asks for, in llguidance's own notation."""
    if params.regex is not None:
        return llguidance.LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, params.choice)))
    if params.grammar is not None:
        return llguidance.LLMatcher.grammar_from_lark(params.grammar)
    schema: Any = '{"type": "object"}' if params.json is None else params.json
    whitespace = params.whitespace_pattern or WHITESPACE
    options: Any = {"whitespace_flexible": False}
    if not params.disable_any_whitespace:
        options = {"whitespace_pattern": whitespace}
    return llguidance.LLMatcher.grammar_from_json_schema(_as_object(schema), defaults=options)


def _as_object(schema: str) -> str:
    """`true` and `false` as the objects that mean the same."""
    return {"true": "{}", "false": '{"not": {}}'}.get(schema, schema)


def _first_line(message: str) -> str:
    return message.splitlines()[0][:500] if message else "the grammar is not valid"


class GrammarStates:
    """The states of the running sequences that have a grammar. Engine thread only.

    The masks of a step are made by threads of llguidance between `begin_masks` and `end_masks`, so that the engine can
    commit the step before meanwhile. No state may be touched in between, other than forgotten.
    """

    def __init__(self, vocab_size: int):
        self._states: dict[Sequence, GrammarState] = {}
        self._num_words = math.ceil(vocab_size / 32)
        self._buffers: dict[int, np.ndarray] = {}  # by number of rows: megabytes, which are not allocated in every step
        self._complete: set[Sequence] = set()
        self._begun: _Masks | None = None

    @functools.cached_property
    def _executor(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor(_THREADS)

    @functools.cached_property
    def _thread(self) -> ThreadPoolExecutor:
        """Waits for the executor's threads in the engine's place."""
        return ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def __bool__(self) -> bool:
        """Whether any running sequence has a grammar."""
        return bool(self._states)

    def add(self, sequence: Sequence) -> None:
        """Starts the state of a new sequence, if its request has a grammar."""
        grammar = sequence.request.grammar
        if grammar is not None:
            self._states[sequence] = grammar.start()

    def drop(self, sequence: Sequence) -> None:
        """Forgets a sequence that has ended."""
        self._states.pop(sequence, None)
        self._complete.discard(sequence)

    def advance(self, rows: Iterable[Row], tokens: Iterable[int]) -> None:
        """Advances the states by the tokens of a step that is about to be committed."""
        for (sequence, _, _, samples), token in zip(rows, tokens, strict=False):
            state = self._states.get(sequence)
            if state is not None and samples and token >= 0 and sequence.status is not Status.FINISHED:
                matcher = state.matcher
                if matcher.consume_token(token) and matcher.is_stopped():
                    self._complete.add(sequence)

    def is_complete(self, sequence: Sequence) -> bool:
        """Whether nothing but an end-of-sequence token could follow in a sequence that has a grammar."""
        return sequence in self._complete

    def begin_masks(self, rows: AbstractSequence[Row], num_seqs: int) -> None:
        """Begins to make the masks of a step, from the tokens of all steps before it.

        Args:
            num_seqs: rows of the step's bucket.
        """
        wanted = []
        for index, (sequence, _, _, samples) in enumerate(rows):
            state = self._states.get(sequence) if samples else None
            if state is not None and sequence.status is not Status.FINISHED:
                wanted.append((state.lexer, index, state.matcher))
        array = self._buffer(num_seqs, [index for _, index, _ in wanted])
        wanted.sort()  # by lexer: threads take neighbours, and should not wait for each other
        matchers = [(matcher, index) for _, index, matcher in wanted]
        self._begun = _Masks(rows, array, matchers)
        if len(matchers) <= _FEW:
            for matcher, index in matchers:
                fill_next_token_bitmask(matcher, array, index)
        else:
            # Python's lock is given up until the masks are being made: otherwise they would begin at its next switch,
            # which may be 5 ms away.
            started = threading.Event()
            self._begun.done = self._thread.submit(self._fill, matchers, array, started)
            started.wait()

    @property
    def masks_are_made(self) -> bool:
        """Whether `end_masks` would not wait."""
        return self._begun is None or self._begun.done is None or self._begun.done.done()

    def _fill(self, matchers: list[tuple[llguidance.LLMatcher, int]], array: np.ndarray, started: threading.Event):
        started.set()
        fill_next_token_bitmask_par(self._executor, matchers, array)

    def end_masks(self) -> tuple[np.ndarray, list[tuple[Sequence, str]]]:
        """Waits for the masks that were begun.

        Returns:
            [num_seqs, ceil(V / 32)] int32, all ones where there is no grammar, valid until the next masks are begun;
            and the sequences that cannot go on, with the reason. Their rows are all ones too.
        """
        begun, self._begun = self._begun, None
        assert begun is not None, "masks were not begun"
        if begun.done is not None:
            begun.done.result()
        failed = []
        for matcher, index in begun.matchers:
            if matcher.is_error():
                begun.array[index] = -1
                sequence = begun.rows[index].sequence
                if sequence.status is not Status.FINISHED:
                    failed.append((sequence, _first_line(matcher.get_error())))
        return begun.array, failed

    def _buffer(self, num_seqs: int, taken: list[int]) -> np.ndarray:
        """Room for the masks of a step, all ones but for the rows that are `taken`."""
        if num_seqs not in self._buffers:
            self._buffers[num_seqs] = np.empty((num_seqs, self._num_words), np.int32)
        free = np.ones(num_seqs, bool)
        free[taken] = False
        self._buffers[num_seqs][free] = -1
        return self._buffers[num_seqs]


@dataclasses.dataclass
class _Masks:
    """The masks of a step that are being made."""

    rows: AbstractSequence[Row]
    array: np.ndarray
    matchers: list[tuple[llguidance.LLMatcher, int]]  # with their rows
    done: Future[None] | None = None  # None: made already
