"""What one megatron-core wrote, the other reads: .venv has the first, .venv-next the second.

Run as a program it runs the cases on standard input, as JSON, with the interpreter's own version.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import run_ranks, tiny_hf
from test_checkpoint import check_case
from test_experts import tiny_moe

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = {name: ROOT / name / "bin" / "python" for name in (".venv", ".venv-next")}
TP2, DP2 = (2, 1, 1), (1, 1, 1)


@pytest.mark.skipif(
    not PYTHONS[".venv-next"].exists(),
    reason="needs .venv-next: bash tools/setup_env.sh --megatron 0.19.2",
)
@pytest.mark.parametrize(("writer", "reader"), [(".venv", ".venv-next"), (".venv-next", ".venv")])
def test_a_checkpoint_goes_on_bitwise_under_the_other_version(
    tmp_path: Path, writer: str, reader: str
) -> None:
    dense, experts = tiny_hf(tmp_path / "hf", "qwen2"), tiny_moe(tmp_path / "moe")
    # Model folder, distributed optimizer, expert parallel size.
    kinds = [(dense, False, 1), (dense, True, 1), (experts, True, 2)]
    folders = [tmp_path / str(number) for number in range(len(kinds))]

    def run(environment: str, *actions: tuple[str, tuple[int, int, int]]) -> None:
        cases = [
            (*action, str(folder), distributed, str(out), ep)
            for out, (folder, distributed, ep) in zip(folders, kinds, strict=True)
            for action in actions
        ]
        subprocess.run(
            [PYTHONS[environment], __file__],
            input=json.dumps(cases),
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
            text=True,
            check=True,
        )

    for out in folders:
        out.mkdir()
    run(writer, ("peer2", DP2), ("save2", DP2))
    run(reader, ("same", DP2), ("load", TP2))


if __name__ == "__main__":
    run_ranks(
        check_case,
        2,
        [
            (action, tuple(layout), Path(folder), distributed, Path(out), ep)
            for action, layout, folder, distributed, out, ep in json.load(sys.stdin)
        ],
    )
