"""Breaks the scheduler and the page pool on purpose, one way at a time, and says which test notices.

    python -m tests.mutations [PART_OF_A_NAME ...]

A test that cannot fail proves nothing. Each mutation is made in a copy of the working tree, in a process forked from
one that has loaded the libraries. Takes about half a minute each; exits with 1 if nobody noticed one of them.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax  # noqa: F401 - loaded once, before the forks
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCHEDULER, POOL, SWAP = (f"jax_engine/{name}.py" for name in ("scheduler", "page_pool", "swap_space"))
GROUPS = "jax_engine/page_groups.py"
POLICIES, BUCKETS, STEP_TIME = (f"jax_engine/{name}.py" for name in ("policies", "buckets", "step_time"))
#: Tests without a model; those that need one are named where nobody else could notice.
QUICK = tuple(
    f"tests/test_{name}.py"
    for name in (
        "scheduler",
        "policies",
        "request_queue",
        "prefix_cache",
        "preemption",
        "scheduler_machine",
        "page_groups",
        "buckets",
    )
)
WITH_MODEL = (
    "one_bucket or bit_for_bit or real_pool or poisoned or every_request or change_no_bit "
    "or gemma or gpt_oss or mistral or smollm"
)
POISONED = ("tests/test_prefix_cache.py::test_a_poisoned_page_fails_one_request_and_is_not_used_again",)
#: A test that hangs has noticed too.
PATIENCE_S = 120
#: Hypothesis looks for one failing example and does not make it smaller.
PROFILE = """
from hypothesis import Phase, settings
settings.register_profile("mutations", phases=(Phase.generate,), deadline=None)
settings.load_profile("mutations")
"""


class Mutation(NamedTuple):
    """`old`, which stands once in `file`, becomes `new`; one of the tests should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = QUICK


MUTATIONS = (
    Mutation("a token over the budget", SCHEDULER, "min(gap, budget), work", "min(gap, budget + 1), work"),
    Mutation("prompts before decodes", SCHEDULER, "        self._schedule_decodes(work)\n        if", "        if"),
    Mutation(
        "decodes past the limit",
        SCHEDULER,
        "num_tokens - start != 1 or num_tokens >= sequence.max_tokens_total",
        "num_tokens - start != 1",
    ),
    Mutation(
        "a token past the limit", SCHEDULER, "elif len(sequence.token_ids) >= seq", "elif len(sequence.token_ids) > seq"
    ),
    Mutation("pending tokens stay pending", SCHEDULER, "                sequence.num_pending -= 1\n", ""),
    Mutation("a slot is lost", SCHEDULER, "        self._free_slots.append(sequence.slot)\n", ""),
    Mutation("a page is lost", POOL, "in reversed(list(zip_longest", "in reversed(list(zip"),
    Mutation("sharing without a reference", POOL, "self._references[page] += 1", "pass"),
    Mutation(
        "a partly filled page is shared",
        POOL,
        "sequence.num_indexed, num_tokens // self",
        "sequence.num_indexed, (num_tokens + 1) // self",
    ),
    Mutation(
        "a page is found before it is written",
        SCHEDULER,
        "index(sequence, sequence.num_computed)",
        "index(sequence, len(sequence.token_ids))",
    ),
    Mutation(
        "pages leave with steps in flight",
        SCHEDULER,
        "        if sequence.num_inflight_steps:\n            self._leaving",
        "        if False:\n            self._leaving",
    ),
    Mutation(
        "a found page is not verified", POOL, "return page if self._contents[page] == expected else None", "return page"
    ),
    Mutation("salts are ignored", POOL, 'b"" if salt is None else self._hash(salt.encode(), b"salt")', 'b""'),
    Mutation("the latest page is evicted", POOL, "popitem(last=False)", "popitem(last=True)"),
    Mutation(
        "a prompt's first page is evicted first", POOL, "in reversed(list(zip_longest", "in iter(list(zip_longest"
    ),
    Mutation("a window gives back what is seen", GROUPS, "num_tokens - self.window + 1", "num_tokens + 1"),
    Mutation("windows give nothing back", POOL, "range(sequence.num_dropped, min(first", "range(0, min(0"),
    Mutation("a beginning is found without its window", POOL, "while number >= self", "while number > number + self"),
    Mutation(
        "a page serves another group", POOL, "return digest + bytes((group,)) if group else digest", "return digest"
    ),
    Mutation(
        "pages that windows gave back stay in the index", POOL, "range(min(sequence.num_dropped, ", "range(min(0, "
    ),
    Mutation("tokens without a page", SCHEDULER, "return min(count, sequence.num_places - start)", "return count"),
    Mutation(
        "no token is left to compute",
        SCHEDULER,
        "most = len(sequence.token_ids) - 1\n",
        "most = len(sequence.token_ids)\n",
    ),
    Mutation(
        "judged prompts are found, not computed",
        SCHEDULER,
        "min(most, sequence.num_reached) if sequence.scores_prompt else most",
        "most",
    ),
    Mutation("found pages count as free", POOL, "return num_free + self._num_new", "return self._num_new"),
    Mutation("no reserve for those who run", SCHEDULER, "len(self._running) * pool.groups.num", "0"),
    Mutation("a bad page stays in the index", SCHEDULER, "self.pool.forget(sequence)", "pass", POISONED),
    Mutation("anybody gives way", SCHEDULER, "and rank(other) > own]", "and other is not sequence]"),
    Mutation("who has a chunk in the step gives way in it", SCHEDULER, "if other not in scheduled and rank", "if rank"),
    Mutation("the dearest to bring back gives way", SCHEDULER, "(cost(other), -other.order)", "-other.order"),
    Mutation("who gave way comes back at once", SCHEDULER, "if work.preempted or (self", "if (self"),
    Mutation("swapped pages come back elsewhere", SWAP, "offset + missing - first, table", "offset, table"),
    Mutation("swap space is lost", SCHEDULER, "            self.swap_space.give_back(sequence.swap)\n", ""),
    Mutation("swap space is overdrawn", SWAP, "if size <= self.num_free else math.inf", "if True else math.inf"),
    Mutation("the dearer way back", SWAP, "or swap < self.sec", "or swap > self.sec"),
    Mutation("copies cost one way only", SWAP, "return 2 * size", "return size"),
    Mutation(
        "others of a request wait forever",
        SCHEDULER,
        "                    self._let_follow(sequence)\n",
        "                    pass\n",
    ),
    Mutation("prefills are not counted", SCHEDULER, ", self._most_prefills - len(self._prefilling))", ", 99)"),
    Mutation(
        "a static batch is joined",
        SCHEDULER,
        'self.limits.scheduling == "static" and self._batch',
        "False and self._batch",
    ),
    Mutation("no ageing", POLICIES, "request.priority * self.limits.priority_ageing_s", "request.priority * 1e9"),
    Mutation("output tokens are free", POLICIES, "self.OUTPUT_COST * num_output", "0.0 * num_output"),
    Mutation(
        "service is saved up",
        POLICIES,
        "            counter = max(counter, self",
        "            counter = min(counter, self",
    ),
    Mutation(
        "who is late does not yield",
        POLICIES,
        "self._latest_start(sequence) < self.now:\n            self._late",
        "False:\n            self._late",
    ),
    Mutation("no bound on the gap", SCHEDULER, "limits.max_decode_gap_s is not None and", "False and"),
    Mutation("no margin on step times", STEP_TIME, "* self._worst[1]", "* 1.0"),
    Mutation(
        "the whole line counts as the next step's",
        SCHEDULER,
        "itertools.islice(self._policy.upcoming(), max(places, 0))",
        "self._policy.upcoming()",
    ),
    Mutation("buckets are not filled", BUCKETS, "if num_decodes < below < total", "if False"),
    Mutation("a bucket too large", BUCKETS, "if size >= num_rows:", "if size > num_rows:"),
)


class _Failures:
    """A pytest plugin that collects who failed."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.names.append(report.nodeid.split("/")[-1])


def who_notices(mutation: Mutation, tree: Path) -> list[str]:
    """The first tests that fail."""
    path = tree / mutation.file
    source = path.read_text()
    assert source.count(mutation.old) == 1, (
        f"{mutation.name}: {mutation.old!r} stands {source.count(mutation.old)} times"
    )
    path.write_text(source.replace(mutation.old, mutation.new))
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(PATIENCE_S)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        failures = _Failures()
        chosen = ["-k", f"not ({WITH_MODEL})"] if mutation.tests == QUICK else []
        pytest.main(["-p", "no:cacheprovider", "-q", "-x", "--tb=no", *chosen, *mutation.tests], plugins=[failures])
        os.write(writer, json.dumps(failures.names).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, "rb") as answers:
        answer = answers.read()
    path.write_text(source)
    return json.loads(answer) if answer else [f"a test hangs (over {PATIENCE_S} s)"]


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    chosen = [m for m in MUTATIONS if not argv[1:] or any(part in m.name for part in argv[1:])]
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "results"))
        with open(tree / "tests" / "conftest.py", "a") as conftest:
            conftest.write(PROFILE)
        os.chdir(tree)
        sys.path[:0] = [str(tree)]
        sys.dont_write_bytecode = True
        for mutation in chosen:
            started = time.monotonic()
            names = who_notices(mutation, tree)
            unnoticed += not names
            print(f"{mutation.name}: {', '.join(names) or 'NOBODY'} ({time.monotonic() - started:.0f} s)", flush=True)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
