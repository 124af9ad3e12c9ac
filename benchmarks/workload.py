"""Workloads: lists of (prompt length, output length), and prompts of random token ids for them.

Read by every benchmark, so that engines and modes are compared on the same work.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from jax_engine import ConfigError

FOLDER = Path(__file__).parent / "workloads"


@dataclasses.dataclass(frozen=True)
class Workload:
    """`requests` holds (prompt length, output length) in tokens, in order of arrival."""

    name: str
    about: str
    requests: tuple[tuple[int, int], ...]

    @property
    def total_prompt(self) -> int:
        """Prompt tokens of all requests."""
        return sum(prompt for prompt, _ in self.requests)

    @property
    def total_output(self) -> int:
        """Output tokens of all requests."""
        return sum(output for _, output in self.requests)

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        """Random token ids below vocab_size, the same for the same seed."""
        random = np.random.default_rng(seed)
        return [random.integers(0, vocab_size, length).tolist() for length, _ in self.requests]

    def head(self, num_requests: int, max_output: int) -> "Workload":
        """The first requests with shortened outputs: a warm-up."""
        requests = tuple((prompt, min(output, max_output)) for prompt, output in self.requests[:num_requests])
        return Workload(f"{self.name}, warm-up", self.about, requests)


def load(source: str) -> Workload:
    """Reads a workload: a JSON file, or the name of one in benchmarks/workloads/.

    Raises:
        ConfigError: no such file, or it is no workload.
    """
    path = Path(source)
    if not path.suffix:
        path = FOLDER / f"{source}.json"
    if not path.is_file():
        names = ", ".join(sorted(known.stem for known in FOLDER.glob("*.json")))
        raise ConfigError(f"no workload {source!r}; give a JSON file or one of {names}")
    fields = json.loads(path.read_text())
    try:
        requests = tuple((int(prompt), int(output)) for prompt, output in fields["requests"])
        workload = Workload(fields["name"], fields["about"], requests)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no workload (name, about, requests as [prompt, output]): {error!r}") from None
    if not requests or min(min(pair) for pair in requests) < 1:
        raise ConfigError(f"{path}: every request needs at least one prompt token and one output token")
    for name in ("total_prompt", "total_output"):
        stated, total = fields.get(name), getattr(workload, name)
        if stated != total:
            raise ConfigError(f"{path}: {name} says {stated}, the requests add up to {total}")
    return workload
