"""`jax-engine replay`: runs the real scheduler through a step log and compares every decision."""

from collections.abc import Sequence

from serving.commands import common


def run(argv: Sequence[str]) -> int:
    """0: the same decisions. 1: a difference, which is printed. See cli.main for what else it raises and returns."""
    from jax_engine.replay import Replay
    from jax_engine.step_log import LogReader

    path = common.parse_tool(common.tool_flags(), "replay", "LOG", argv)
    if path is None:
        return 0
    log = LogReader(path)
    replay = Replay(log)
    difference = replay.run()
    if log.cut_off:
        print("the last line is cut off; replayed up to there")
    if difference is not None:
        print(difference)
        return 1
    print(f"the same decisions: {replay.num_decisions}, {replay.num_steps} steps, {replay.num_requests} requests")
    return 0
