"""`jax-engine generate`: continues prompts and prints the text, as it comes where there is one completion."""

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from absl import flags as absl_flags

from jax_engine import RequestOutput, RequestOutputKind, SamplingParams
from serving import flags
from serving.cli import COMMANDS
from serving.commands import common

if TYPE_CHECKING:
    from jax_engine import AsyncEngine


def run(argv: Sequence[str]) -> int:
    """Generates once for every prompt. See cli.main for what it raises and returns."""
    flag_values = common.engine_flags(log_level="warning")
    here = {"flag_values": flag_values, "module_name": "Input and output"}
    absl_flags.DEFINE_multi_string("prompt", [], "Text to continue; may be repeated.", **here)
    absl_flags.DEFINE_string("prompt_file", None, "File whose text is a prompt; - for stdin.", **here)
    absl_flags.DEFINE_boolean("json", False, "One JSON object per prompt and line.", **here)
    flags.define_sampling(flag_values)
    if not common.parse(flag_values, "generate", COMMANDS["generate"], argv):
        return 0
    prompts = _prompts(flag_values)
    chosen = flags.values(flag_values, SamplingParams)
    params = SamplingParams(**chosen)
    streams = len(prompts) == 1 and params.n == 1 and not flag_values["json"].value
    kind = RequestOutputKind.DELTA if streams else RequestOutputKind.FINAL_ONLY
    params = dataclasses.replace(params, output_kind=kind)
    engine = common.build_engine(common.engine_config(flag_values), flags.non_defaults(flag_values))
    params = dataclasses.replace(params, **{**engine.sampling_defaults, **chosen})
    try:
        if streams:
            return asyncio.run(_print_stream(engine, prompts[0], params))
        return asyncio.run(_print_all(engine, prompts, params, as_json=bool(flag_values["json"].value)))
    finally:
        engine.shutdown()


def _prompts(flag_values: absl_flags.FlagValues) -> list[str]:
    prompts: list[str] = list(flag_values["prompt"].value or ())
    if path := flag_values["prompt_file"].value:
        try:
            with contextlib.nullcontext(sys.stdin) if path == "-" else open(path, encoding="utf-8") as file:
                prompts.append(file.read())
        except (OSError, UnicodeDecodeError) as error:
            raise flags.UsageError(f"prompt_file cannot be read: {error}") from None
    if not prompts:
        raise flags.UsageError("nothing to continue: give --prompt or --prompt_file")
    return prompts


async def _print_stream(engine: "AsyncEngine", prompt: str, params: SamplingParams) -> int:
    async with contextlib.aclosing(engine.generate(prompt, params)) as outputs:  # type: ignore[type-var]
        async for output in outputs:
            if output.error is not None:
                print(f"\njax-engine: {output.error}", file=sys.stderr)
                return 1
            for completion in output.outputs:
                print(completion.text, end="", flush=True)
    print()
    return 0


async def _print_all(engine: "AsyncEngine", prompts: Sequence[str], params: SamplingParams, *, as_json: bool) -> int:
    async def final(prompt: str) -> RequestOutput:
        async with contextlib.aclosing(engine.generate(prompt, params)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                last = output
        return last

    outputs = await asyncio.gather(*map(final, prompts))
    for prompt, output in zip(prompts, outputs, strict=True):
        if as_json:
            print(msgspec.json.encode(_document(prompt, output)).decode())
            continue
        for completion in output.outputs:
            print(f"--- {prompt!r}, completion {completion.index} ({completion.finish_reason})\n{completion.text}")
    failed = [output.error for output in outputs if output.error is not None]
    for error in failed:
        print(f"jax-engine: {error}", file=sys.stderr)
    return 1 if failed else 0


def _document(prompt: str, output: RequestOutput) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "prompt_logprobs": output.prompt_logprobs,
        "outputs": output.outputs,
        "error": output.error,
    }
