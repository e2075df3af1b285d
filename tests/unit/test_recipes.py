"""Every shipped config is loaded, checked and planned; every plan in the docs is what the command
prints today (Markdown blocks that begin with `$ qlrl plan`)."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_qlrl.cli import app
from megatron_qlrl.config.checks import check_layout
from megatron_qlrl.config.load import load_config
from megatron_qlrl.plan.estimate import Lengths
from megatron_qlrl.plan.hardware import HARDWARE
from megatron_qlrl.plan.phase import Cluster, plan_phase
from megatron_qlrl.plan.shapes import find_shape

ROOT = Path(__file__).resolve().parents[2]
GPUS = {
    "qwenlong-l1-7b-1n8g": 8,
    "qwenlong-l1-14b-4n8g": 32,
    "qwenlong-l1-32b-4n8g": 32,
    "qwenlong-l1.5-4b-1n8g": 8,
    "qwenlong-l1.5-30b-a3b-4n8g": 32,
    "quickstart": 2,
    "smollm2-135m": 1,
}
BLOCK = re.compile(r"```console\n\$ qlrl (plan [^\n]*)\n(.*?)```", re.DOTALL)
DOCS = [*ROOT.glob("examples/*/README.md"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]


def test_every_recipe_has_its_gpus() -> None:
    recipes = {p.name for p in ROOT.glob("examples/qwenlong-*")}
    assert recipes == GPUS.keys() - {"quickstart", "smollm2-135m"}


@pytest.mark.parametrize("name", GPUS)
def test_recipes_fit_their_gpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    folder = Path("examples") / name
    config = load_config(folder)
    shape, _ = find_shape(config.model)
    cluster = Cluster(GPUS[name], HARDWARE["h100-80g"])
    hours = []
    for phase in config.phase_configs():
        check_layout(phase, shape, world_size=cluster.gpus)
        assert plan_phase(phase, shape, cluster).problems == ()
        usual = plan_phase(phase, shape, cluster, lengths=Lengths(20_000, 3_000))
        hours.append(f"{usual.gpu_hours(cluster.gpus):,.0f}")
    if name.startswith("qwenlong"):
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


@pytest.mark.parametrize("gpus", [32, 256, 1024])
def test_the_table_of_lengths_is_what_the_command_says(
    gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    command = "plan examples/qwenlong-l1-32b-4n8g algorithm.generation_rounds=1 --json"
    options = ["--gpus", str(gpus), "--lengths", "lognormal"]
    done = CliRunner().invoke(app, [*command.split(), *options])
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    for phase in json.loads(done.stdout)["phases"]:
        even, sides = phase["generation"]["at_mean_s"], phase["generation"]["sides"]
        seconds = {name: f"{s['read_s'] + s['decode_s']:,.0f}" for name, s in sides.items()}
        idle = {name: f"({s['slots_idle']:.0%})" for name, s in sides.items()}
        row = (
            f"| {gpus:,}, {phase['name']} | {even:,.0f} | {seconds['plain']} {idle['plain']} "
            f"| {seconds['sorted']} | {seconds['partial']} {idle['partial']} |"
        )
        assert row in page
