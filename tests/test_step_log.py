"""The step log and its replay: what was written down suffices to make every decision again, and only the same ones."""

import dataclasses
import json
import random
import stat

import pytest

from jax_engine.config import EngineConfig, ModelConfig, resolve
from jax_engine.engine import Engine
from jax_engine.errors import ConfigError
from jax_engine.planning import cost_model
from jax_engine.replay import Replay
from jax_engine.sampling_params import SamplingParams
from jax_engine.start import log_header
from jax_engine.step_log import Header, LogError, LogReader, StepLog
from jax_engine.testing.byte_tokenizer import ByteTokenizer
from jax_engine.testing.fake_runner import FakeRunner
from serving.cli import main

VOCAB = 64
MODEL = ModelConfig.placeholder(VOCAB, 256)
OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "token_buckets": (16, 32), "page_size": 4, "num_pages": 26}


class Clock:
    """A clock that moves on by a little at every look."""

    now = 100.0

    def __call__(self) -> float:
        self.now += 1e-4
        return self.now


def make_engine(path=None, max_bytes=1 << 30, **options) -> Engine:
    config = EngineConfig(**OPTIONS | options)
    limits = resolve(config, MODEL, platform="cpu", num_pages=64)
    if config.swap_space_gib:
        limits = dataclasses.replace(limits, num_swap_pages=30, swap_page_seconds=1e-4, token_seconds=1e-3)
    header = Header(
        version="1",
        platform="cpu",
        device="fake",
        vocab_size=VOCAB,
        max_position_embeddings=256,
        started=0.0,
        config=config,
        limits=limits,
    )
    log = StepLog(header=header, path=path and str(path), max_bytes=max_bytes)
    runner = FakeRunner(limits, VOCAB)
    tokenizer = ByteTokenizer()
    return Engine(runner, tokenizer, vocab_size=VOCAB, eos_token_ids=[7], config=config, clock=Clock(), step_log=log)


def run(engine: Engine, seed: int, count: int = 30) -> None:
    """Random requests at random times, some with n > 1, stop strings or priorities; some are aborted."""
    chance = random.Random(seed)
    left = list(range(count))
    while left or engine.has_work:
        if left and chance.random() < 0.4:
            number = left.pop()
            prompt = [chance.randrange(32, VOCAB) for _ in range(chance.choice([1, 5, 30, 60]))]
            params = SamplingParams(
                max_tokens=chance.randint(1, 40),
                n=chance.choice([1, 1, 3]),
                stop=chance.choice([None, ["!"], ["0", "a"]]),
                stop_token_ids=[chance.randrange(VOCAB)],
            )
            priority, user = chance.randrange(3), chance.choice(["a", "b", None])
            engine.submit(engine.make_request(f"r{number}", prompt, params, priority, user=user))
        if chance.random() < 0.02:
            engine.abort(f"r{chance.randrange(count)}")
        engine.step()
    engine.step_log.flush()


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "priority", "priority_ageing_s": 0.01},
        {"policy": "fair", "user_weights": ("a=2",)},
        {"policy": "slo", "slo_classes": ("default:5:1",), "swap_space_gib": 1.0},
        {"max_decode_gap_ms": 1.0, "max_concurrent_prefills": 2, "enable_prefix_caching": False},
    ],
    ids=["fcfs", "priority", "fair", "slo-swap", "decode-gap"],
)
@pytest.mark.parametrize(("scheduling", "depth"), [("static", 1), ("sync", 1), ("async", 2), ("async", 4)])
def test_replay_makes_the_same_decisions(tmp_path, options, scheduling, depth):
    path = tmp_path / "log"
    engine = make_engine(path, scheduling=scheduling, max_inflight_steps=depth, **options)
    run(engine, seed=depth)
    assert engine.metrics.preemptions, "the pool is meant to be too small"
    replay = Replay(LogReader(str(path)))
    assert replay.run() is None
    assert replay.num_requests == 30
    assert replay.num_steps == sum(engine.metrics.steps.values())
    kinds = {line["type"] for line in lines_of(path)}
    assert kinds == {"header", "added", "ended", "step", "done"}
    assert not replay.scheduler.has_work
    replay.scheduler.check()


def altered(path, change) -> str:
    """The log with one step's line changed; returns its path."""
    lines = lines_of(path)
    for line in lines[len(lines) // 2 :]:
        if line["type"] == "step" and line["decision"]["rows"]:
            number = line["number"]
            change(line)
            break
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return number


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("rows[0]", lambda line: line["decision"]["rows"][0].__setitem__(2, 9)),
        ("number of rows", lambda line: line["decision"]["rows"].append([99, 0, 1, True])),
        ("free_pages", lambda line: line.__setitem__("free_pages", 1000)),
        ("number of preempted", lambda line: line["decision"]["preempted"].append(0)),
        ("bucket", lambda line: line.__setitem__("bucket", [48, 4, True])),
    ],
)
def test_an_altered_log_is_found_at_its_step(tmp_path, capsys, field, change):
    path = tmp_path / "log"
    run(make_engine(path), seed=1)
    number = altered(path, change)
    assert main(["replay", str(path)]) == 1
    printed = capsys.readouterr().out
    assert f"step {number}: {field} differs" in printed or (field == "bucket" and "bucket[" in printed)


def test_an_altered_token_changes_what_follows(tmp_path):
    path = tmp_path / "log"
    run(make_engine(path), seed=2)
    lines = lines_of(path)
    for line in lines:
        if line["type"] == "done":
            line["tokens"] = [7 for _ in line["tokens"]]  # the end-of-sequence token
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Replay(LogReader(str(path))).run() is not None


def test_a_cut_off_log_is_replayed_up_to_there(tmp_path, capsys):
    path = tmp_path / "log"
    run(make_engine(path), seed=3)
    assert main(["replay", str(path)]) == 0
    whole = capsys.readouterr().out
    assert "same decisions" in whole and "cut off" not in whole
    path.write_bytes(path.read_bytes()[:-9])
    assert main(["replay", str(path)]) == 0
    assert "cut off" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no header"),
        (b"nonsense\n", "no header"),
        (b'{"type":"header","format":99}\n', "format 1 is read, got 99"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(LogError, match=message):
        LogReader(str(path))
    with pytest.raises(LogError, match="cannot be read"):
        LogReader(str(tmp_path / "none"))


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "log"
    run(make_engine(path), seed=4, count=5)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[5] = b'{"type":"step"}\n'
    path.write_bytes(b"".join(lines))
    with pytest.raises(LogError, match=":6:"):
        Replay(LogReader(str(path))).run()


def test_the_memory_holds_the_last_steps_without_tokens():
    engine = make_engine()
    engine.step_log = StepLog(capacity=8)
    run(engine, seed=5)
    records = engine.step_log.records()
    assert len(records) == 8
    numbers = [record.step.number for record in records]
    assert numbers == list(range(numbers[0], numbers[0] + 8))
    assert numbers[-1] == sum(engine.metrics.steps.values()) - 1
    for record in records:
        assert record.done is not None and record.done.tokens == []
        assert record.step.padding == record.step.bucket.num_tokens - sum(
            row[2] for row in record.step.decision["rows"]
        )
        assert record.done.device > 0 and min(record.step.host) > 0 and record.done.commit > 0


def test_device_time_of_overlapping_steps():
    log = StepLog()
    engine = make_engine()
    engine.submit(engine.make_request("a", [40, 41], SamplingParams(max_tokens=4, ignore_eos=True)))
    waits = iter([(2.0, 3.0, True), (3.0, 5.0, True), (7.0, 7.1, False), (7.2, 8.0, True)])
    for dispatched in (1.0, 1.5, 4.0, 4.5):
        log.timed("schedule", dispatched - 0.3, dispatched - 0.2)
        log.timed("build", dispatched - 0.2, dispatched - 0.1)
        log.timed("dispatch", dispatched - 0.1, dispatched)
        schedule = engine.scheduler.schedule()
        log.scheduled(schedule, engine._builder.build(schedule).bucket, engine.scheduler, 0)
        if dispatched > 1.0:
            began, ended, waited = next(waits)
            log.timed("wait", began, ended)
            log.committed([9], waited)
        log.end_turn(idle=False)
        engine.scheduler.commit(schedule, [40])
    log.timed("wait", *next(waits)[:2])
    log.committed([9], True)
    log.end_turn(idle=True)
    done = [record.done for record in log.records()]
    assert [round(d.device, 6) for d in done] == [2.0, 2.0, 2.1, 0.9]
    # The third was ready before anybody asked, so where it ended, and where the fourth could start, is not known.
    assert [d.exact for d in done] == [True, True, False, False]


def test_the_file_is_private_bounded_and_may_fail(tmp_path, caplog):
    path = tmp_path / "log"
    path.write_text("of before")
    path.chmod(0o644)
    engine = make_engine(path, max_bytes=5000)
    run(engine, seed=6)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size <= 5000 and "largest size" in caplog.text
    assert Replay(LogReader(str(path))).run() is None
    with pytest.raises(ConfigError, match=r"step_log .* cannot be written"):
        make_engine(tmp_path / "no" / "log")


def test_a_full_disk_ends_the_log_and_not_the_engine(caplog):
    engine = make_engine("/dev/full")
    run(engine, seed=7)
    assert "the step log ends here" in caplog.text
    assert engine.metrics.requests.total() >= 30


def test_every_way_into_the_scheduler_is_written_down():
    """Who gives the scheduler another method that changes it has to write its calls into the log and replay them."""
    from jax_engine.scheduler import Scheduler

    methods = {name for name, value in vars(Scheduler).items() if callable(value) and not name.startswith("_")}
    assert methods == {"add", "finish", "schedule", "commit"} | {"check"}


def test_requests_keep_everything_but_their_text(tmp_path):
    path = tmp_path / "log"
    engine = make_engine(path)
    params = SamplingParams(max_tokens=3, logit_bias={5: 1.0}, stop=["x"], seed=4)
    request = dataclasses.replace(engine.make_request("a", [40, 41], params, 2), prompt="secret")
    engine.submit(request)
    while engine.has_work:
        engine.step()
    assert "secret" not in path.read_text()
    (added,) = (event for event in LogReader(str(path)) if hasattr(event, "request"))
    assert added.request == dataclasses.replace(request, prompt=None)


def test_a_real_model_writes_a_log_that_replays(tmp_path, one_bucket):
    path = str(tmp_path / "log")
    engine = one_bucket.engine("async", num_pages=20)
    engine.step_log = StepLog(header=log_header(one_bucket.config, one_bucket.runner), path=path)
    run(engine, seed=8, count=12)
    engine.step_log.close()
    log = LogReader(path)
    assert log.header.limits == engine.limits and log.header.platform == "cpu"
    replay = Replay(log)
    assert replay.run() is None and replay.num_requests == 12
    model = cost_model.fit([LogReader(path)])
    assert model.num_steps == replay.num_steps and model.buckets[0].bucket.num_tokens == 24
