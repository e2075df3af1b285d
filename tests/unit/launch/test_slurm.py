"""What is said of nodes that do not fit, and how failures are counted."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_qlrl.launch.slurm import Node, by_node, compare, count_failure, parse_gpus

H100 = (81559, 4)
GOOD = Node(
    name="n0",
    versions={"torch": "2.13.0", "commit": "abc"},
    gpus=(H100, H100),
    free_bytes=90 * 10**9,
    clock_s=1000.0,
    sees=True,
)


def problems(bad: Node, *, tasks: int = 2) -> list[str]:
    nodes = [GOOD, replace(GOOD, name="n1"), replace(bad, name="n2")]
    return compare(nodes, tasks_per_node=tasks, need_bytes=80 * 10**9)


def test_like_nodes_fit() -> None:
    assert problems(replace(GOOD, clock_s=1004.9)) == []


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (replace(GOOD, gpus=(H100,)), "1 GPU(s), n0 has 2"),
        (replace(GOOD, gpus=(H100, (40960, 4))), "GPU 1 has 40960 MiB, GPU 0 of n0 81559 MiB"),
        (
            replace(GOOD, gpus=((81559, 60000), H100)),
            "GPU 0: 60000 MiB of 81559 are in use by another process",
        ),
        (
            replace(GOOD, free_bytes=79 * 10**9),
            "run.dir has 79.0 GB free, a checkpoint needs about 80.0 GB",
        ),
        (
            replace(GOOD, sees=False, free_bytes=0),
            "does not see run.dir of n0; it must lie on a file system they share",
        ),
        (
            replace(GOOD, versions={"torch": "2.12.0", "commit": "abc"}),
            "torch is 2.12.0, on n0 2.13.0",
        ),
        (replace(GOOD, clock_s=940.0), "its clock is -60 s off that of n0"),
    ],
)  # fmt: skip
def test_the_node_that_does_not_fit_is_named(bad: Node, said: str) -> None:
    assert problems(bad) == [f"n2: {said}"]


def test_too_few_gpus_are_said_of_every_node() -> None:
    assert problems(GOOD, tasks=3) == [f"{n}: 2 GPU(s) for 3 tasks" for n in ("n0", "n1", "n2")]


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ({"n0": "", "n1": ""}, []),
        ({"n0": "no file", "n1": "no file"}, ["no file"]),
        ({"n0": "", "n1": "no file"}, ["n1: no file"]),
        ({"n0": "disk", "n1": "no file"}, ["n0: disk", "n1: no file"]),
    ],
)
def test_a_problem_of_all_nodes_is_said_once(found: dict[str, str], shown: list[str]) -> None:
    assert by_node(found) == shown


def test_gpus_as_nvidia_smi_lists_them() -> None:
    assert parse_gpus("143771, 0\n143771, 523\n") == [(143771, 0), (143771, 523)]
    assert parse_gpus("\n") == []


def test_failures_count_until_there_is_a_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = tmp_path / "run"
    assert [count_failure(run) for _ in range(2)] == [1, 2]
    (run / "checkpoints" / "step_00000005").mkdir(parents=True)
    assert [count_failure(run) for _ in range(3)] == [1, 2, 3]
    (run / "checkpoints" / "step_00000010.tmp").mkdir()  # was not finished
    assert count_failure(run) == 4
    (run / "checkpoints" / "step_00000010").mkdir()
    assert count_failure(run) == 1


def test_another_job_counts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert [count_failure(tmp_path) for _ in range(2)] == [1, 2]
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert count_failure(tmp_path) == 1
