"""The benchmarks' own arithmetic: workloads, percentiles, ratios, results files."""

import json
from pathlib import Path

import pytest

from benchmarks import report, workload

ALL = sorted(path.stem for path in workload.FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", ALL)
def test_workload_in_the_folder_loads(name: str) -> None:
    work = workload.load(name)
    assert work.name == name
    assert work.total_output >= len(work.requests)


def test_prompts_are_the_same_for_the_same_seed_and_fit_the_vocabulary() -> None:
    work = workload.Workload("w", "", ((3, 1), (5, 2)))
    prompts = work.prompts(10, seed=1)
    assert [len(prompt) for prompt in prompts] == [3, 5]
    assert prompts == work.prompts(10, seed=1) != work.prompts(10, seed=2)
    assert all(0 <= token < 10 for prompt in prompts for token in prompt)


def test_head_shortens_a_workload() -> None:
    work = workload.Workload("w", "", ((3, 1), (5, 20), (7, 7)))
    assert work.head(2, 4).requests == ((3, 1), (5, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"requests": [[1, 1]]}, "is no workload"),
        ({"name": "w", "about": "", "requests": [[1]]}, "is no workload"),
        ({"name": "w", "about": "", "requests": []}, "at least one prompt token"),
        ({"name": "w", "about": "", "requests": [[1, 0]]}, "at least one prompt token"),
        ({"name": "w", "about": "", "requests": [[1, 2]], "total_prompt": 1, "total_output": 3}, "add up to 2"),
    ],
)
def test_bad_workload_is_refused(tmp_path: Path, fields: dict, message: str) -> None:
    path = tmp_path / "w.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        workload.load(str(path))


def test_unknown_workload_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="skewed"):
        workload.load("no-such")


def test_percentiles() -> None:
    assert report.percentiles([]) is None
    values = report.percentiles(range(101))
    assert values == {"p50": 50, "p90": 90, "p99": 99, "mean": 50, "max": 100}


def test_results_file_says_how_it_was_made(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.json"
    report.write(str(target), report.document("benchmarks.x", ["x", "--flag=a b"], answer=42))
    written = json.loads(target.read_text())
    assert written["command"] == "python -m benchmarks.x '--flag=a b'"
    assert written["answer"] == 42
    assert {"date", "git", "python", "versions", "cpu"} <= set(written)
    assert list(target.parent.iterdir()) == [target]


def test_table_lines_up() -> None:
    lines = report.table([["", "a"], ["long name", "1.0"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
