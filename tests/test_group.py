"""Two real processes that hold one model between them: the same tokens as one, and an end when one is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jax_engine.batch import Adjustments, Batch, no_adjustments
from jax_engine.buckets import Bucket
from jax_engine.config import EngineConfig
from jax_engine.constraints import Constraints
from jax_engine.errors import ConfigError
from jax_engine.group import EXIT_CODE
from jax_engine.plan_codec import PlanError, Sampling, decode, encode
from jax_engine.schedule import Copies, PageCopy

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "golden" / "tiny" / "llama"

PROGRAM = """
import json, sys
import numpy as np
from jax_engine import LLM, SamplingParams

model, address, number, forever = sys.argv[1:]
llm = LLM(
    model=model, max_model_len=128, max_num_seqs=3, page_size=8, token_buckets=(24,), decode_buckets=(),
    compilation_cache_dir="", tensor_parallel_size=2, num_processes=2, process_id=int(number),
    coordinator_address=address, num_pages=16, enable_prefix_caching=False, swap_space_gib=0.01, preemption_mode="swap",
)
prompts = np.load(model + "/expected.npz")["tokens"].tolist()
params = [
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logit_bias={7: -100.0}),
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2, prompt_logprobs=1),
]
outputs = llm.generate(prompts, params, use_tqdm=False)
tokens = [output.outputs[0].token_ids for output in outputs]
print(json.dumps([tokens, llm.metrics.preemptions_by_way["swap"]]), flush=True)
while forever == "forever":
    llm.generate(prompts, params, use_tqdm=False)
"""


class Group:
    """Both processes of a group, each with one CPU device."""

    def __init__(self, last: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(TINY), address, str(number), last],
                cwd=ROOT,
                env=os.environ | {"XLA_FLAGS": ""},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def test_two_processes_give_the_tokens_of_one_and_end_together() -> None:
    greedy = np.load(TINY / "expected.npz")["greedy"].tolist()
    with Group("once") as group:
        out, err = group.processes[0].communicate(timeout=300)
        assert group.processes[0].returncode == 0, err
        got, swaps = json.loads(out.strip().splitlines()[-1])
        assert swaps, "the pool does not hold two sequences to their ends"
        assert (got[0], got[2]) == (greedy[0], greedy[2])
        assert 7 not in got[1]
        assert group.processes[1].wait(timeout=60) == 0


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_lost_process_ends_the_other_within_ten_seconds(victim: int) -> None:
    with Group("forever") as group:
        # The collectives' library says on the same stream whom it has reached.
        assert any(line.startswith("[[") for line in group.processes[0].stdout), "process 0 ended before its answers"
        group.processes[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        survivor = group.processes[1 - victim]
        assert survivor.wait(timeout=10) == EXIT_CODE, survivor.stderr.read()
        assert time.monotonic() - killed < 10
        assert f"lost process {victim} of the group" in survivor.stderr.read()


def test_a_batch_survives_the_wire() -> None:
    adjustments = no_adjustments(2)
    adjustments.values[1, 0] = -np.inf
    batch = Batch(Bucket(8, 2, False), np.arange(40, dtype=np.int32), adjustments, np.full(8, -1, np.int32))
    back = decode(encode(batch))
    assert isinstance(back.adjustments, Adjustments) and back.bucket == batch.bucket
    for got, want in zip(back.adjustments, adjustments, strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(back.packed, batch.packed)
    assert decode(encode(batch._replace(adjustments=None))).adjustments is None
    order = decode(
        encode(Sampling(batch._replace(constraints=Constraints(None, np.ones((2, 3), np.int32))), back.packed))
    )
    assert isinstance(order, Sampling) and order.batch.constraints.bans is None
    np.testing.assert_array_equal(order.batch.constraints.mask, 1)
    copies = Copies([PageCopy(1, 0, [3, 4])], [], [7, 8])
    assert decode(encode(copies)) == copies


@pytest.mark.parametrize("message", [b"", b"\x01", b"\xc1", encode(Bucket(1, 1, True)), b"\x81\xa5class\xa4exec"])
def test_what_is_no_batch_is_refused(message: bytes) -> None:
    with pytest.raises(PlanError):
        decode(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 2}, "needs coordinator_address=host:port"),
        ({"num_processes": 2, "coordinator_address": "here:0"}, "needs coordinator_address=host:port"),
        ({"num_processes": 2, "process_id": 2, "coordinator_address": "here:1"}, r"process_id must be in \[0"),
        ({"process_id": 1}, r"process_id must be in \[0"),
    ],
)
def test_groups_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)
