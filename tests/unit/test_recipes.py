"""Every shipped config is loaded, checked and planned; every plan in the docs is what the command
prints today (Markdown blocks that begin with `$ qlrl plan`)."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_qlrl.cli import app
from megatron_qlrl.config.checks import check_layout
from megatron_qlrl.config.load import load_config
from megatron_qlrl.config.shape import read_shape
from megatron_qlrl.plan.estimate import Lengths
from megatron_qlrl.plan.hardware import HARDWARE
from megatron_qlrl.plan.phase import Cluster, plan_phase

ROOT = Path(__file__).resolve().parents[2]
GPUS = {
    "qwenlong-l1-7b-1n8g": 8,
    "qwenlong-l1-14b-4n8g": 32,
    "qwenlong-l1-32b-4n8g": 32,
    "quickstart": 2,
}
BLOCK = re.compile(r"```console\n\$ qlrl (plan [^\n]*)\n(.*?)```", re.DOTALL)
DOCS = [*ROOT.glob("examples/*/README.md"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]


def test_every_recipe_has_its_gpus() -> None:
    with_shape = {p.parent.parent.name for p in ROOT.glob("examples/*/shape/config.json")}
    assert with_shape == GPUS.keys() - {"quickstart"}


@pytest.mark.parametrize("name", GPUS)
def test_recipes_fit_their_gpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    folder = Path("examples") / name
    config = load_config(folder / "config.yaml")
    model = folder / "shape"
    shape = read_shape(model if model.is_dir() else config.model.path, rope_scaling=None)
    cluster = Cluster(GPUS[name], HARDWARE["h100-80g"])
    hours = []
    for phase in config.phase_configs():
        check_layout(phase, shape, world_size=cluster.gpus)
        assert plan_phase(phase, shape, cluster).problems == ()
        usual = plan_phase(phase, shape, cluster, lengths=Lengths(20_000, 3_000))
        hours.append(f"{usual.gpu_hours(cluster.gpus):,.0f}")
    if model.is_dir():
        readme = (folder / "README.md").read_text(encoding="utf-8")
        assert f"take {' and '.join(hours)} GPU-hours" in readme


def test_plans_in_the_docs_are_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = [(file, m) for file in DOCS for m in BLOCK.finditer(file.read_text(encoding="utf-8"))]
    assert len(blocks) >= 4
    for file, block in blocks:
        done = CliRunner().invoke(app, shlex.split(block[1]))
        assert done.exit_code == 0, (file, block[1])
        assert done.stdout.strip() == block[2].strip(), f"{file}: qlrl {block[1]}"
