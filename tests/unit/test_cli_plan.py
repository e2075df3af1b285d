"""`qlrl plan` as a user meets it: exit codes, one message, JSON, nothing heavy loaded."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_qlrl.cli import main
from megatron_qlrl.config.shape import read_json
from megatron_qlrl.plan.shapes import SHIPPED

MODEL = "DeepSeek-R1-Distill-Qwen-14B"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {{path: models/{MODEL}}}\n"
        "phases:\n"
        "  - {name: short, max_input_tokens: 20000, steps: 3}\n"
        "  - {name: long, max_input_tokens: 60000, steps: 2, overrides: {policy: {cp: 1}}}\n"
        "policy: {tp: 8, cp: 4}\n"
    )
    return path


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["qlrl", "plan", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_what_does_not_fit_is_one_message_with_the_change_that_fits(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, config, "--gpus", 32) == 2
    out, err = capsys.readouterr()
    assert err.startswith(
        "qlrl: error: phase long does not fit on 32 x h100-80g: the update needs "
    )
    assert err.rstrip().count("\n") == 0
    assert "(at: log-probs backward); the smallest change that fits: policy.cp=2" in err
    assert re.search(r"\| layout tp x pp x cp x dp +\| 8 x 1 x 4 x 1", out)  # the plan all the same
    assert run(monkeypatch, config, "phases.1.overrides.policy.cp=2", "--gpus", 32) == 0


def test_no_layout_is_said_so(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["policy.cp=1", "policy.tp=1", "--gpus", 1]
    assert run(monkeypatch, config, *tiny) == 2
    assert "no layout of these GPUs fits: use more of them" in capsys.readouterr().err


def test_json_says_the_same(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        "phases.1.overrides.policy.cp=4",
        "--gpus",
        32,
        "--mean-tokens",
        9000,
        500,
        "--json",
        "--advise",
    ]
    assert run(monkeypatch, config, *args) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["hardware"]["name"]) == (32, "h100-80g")
    assert found["shape_from"] == f"shipped for deepseek-ai/{MODEL}"
    short, long = found["phases"]
    assert (short["name"], long["name"]) == ("short", "long")
    assert long["layout"] == {
        "tp": 8, "pp": 1, "cp": 4, "ep": 1, "recompute": "none", "dp": 1, "rollout_tp": 1,
    }  # fmt: skip
    parts = dict(long["update_bytes"])
    del parts["moment"]
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert long["mean_tokens"] == {"prompt": 9000, "response": 500}
    assert long["gpu_hours"] == pytest.approx(sum(long["seconds"].values()) * 2 * 32 / 3600)
    assert long["problems"] == []
    assert len(long["advice"]) == 5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--hardware", "a100"], "--hardware a100 is not known; use one of h100-80g, h200-141g"),
        (["--gpus", "24"], "24 processes cannot hold policy.tp=8 x pp=1 x cp=4"),
        (["model.path=nowhere"], "model folder nowhere does not exist"),
    ],
)
def test_bad_input(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, config, *args) == 2
    assert message in capsys.readouterr().err


def test_nothing_heavy_is_loaded(config: Path) -> None:
    code = (
        "import sys; from megatron_qlrl.cli import app\n"
        f"sys.argv = ['qlrl', 'plan', {str(config)!r}, 'phases.1.overrides.policy.cp=4']\n"
        "app(standalone_mode=False)\n"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_yarn_plans_the_stretched_model(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """131,072 positions from 32,768: 121,072 of a prompt and 10,000 of its response."""
    (tmp_path / "model").mkdir()
    hf = read_json(SHIPPED)[f"deepseek-ai/{MODEL}"] | {"max_position_embeddings": 32_768}
    (tmp_path / "model" / "config.json").write_text(json.dumps(hf))
    settings = [
        f"model.path={tmp_path}/model", "phases.1.max_input_tokens=121072",
        "rollout.max_response_tokens=10000", "policy.max_tokens_per_row=131072",
        "phases.1.overrides.policy.cp=4", "optimizer.offload=true", "--gpus=32", "--json",
    ]  # fmt: skip
    assert run(monkeypatch, config, *settings) == 2
    message = capsys.readouterr().err
    assert "121072 + 10000 tokens, is beyond the model's 32768 positions" in message
    assert "{rope_type: yarn, factor: 4.0, original_max_position_embeddings: 32768}" in message
    settings += ["model.rope_scaling={rope_type: yarn, factor: 4}"]
    run(monkeypatch, config, *settings, "phases.1.max_input_tokens=121072")
    out, err = capsys.readouterr()
    short, long = json.loads(out)["phases"]
    assert (short["longest_sequence"], long["longest_sequence"]) == (30_000, 131_072)
    assert "positions" not in err


def test_lengths_as_a_distribution(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [config, "phases.1.overrides.policy.cp=4", "rollout.prompts_per_step=8", "--gpus", 32]
    assert run(monkeypatch, *args, "--lengths", "lognormal:1000,0.5", "--json") == 0
    short, long = json.loads(capsys.readouterr().out)["phases"]
    assert short["mean_tokens"]["prompt"] == 20_000
    assert short["mean_tokens"]["response"] == pytest.approx(1000 * 2.718281828**0.125, rel=0.02)
    plain = short["generation"]["sides"]["plain"]
    assert short["seconds"]["prompts"] == plain["read_s"]
    assert short["seconds"]["generation"] == plain["decode_s"]
    assert plain["read_s"] + plain["decode_s"] > short["generation"]["at_mean_s"]
    # The config's own budget makes the plan one of partial rollouts.
    args += ["rollout.tokens_per_round=700", "algorithm.max_staleness=5"]
    assert run(monkeypatch, *args, "--lengths", "lognormal:1000,0.5", "--json") == 0
    own = json.loads(capsys.readouterr().out)["phases"][1]["generation"]
    assert (own["tokens_per_round"], own["max_staleness"]) == (700, 5)
    assert long["generation"]["tokens_per_round"] == 2500
    assert long["generation"]["max_staleness"] == 4
    assert run(monkeypatch, *args, "--lengths", "lognormal:1000,0.5") == 0
    assert "partial with rollout.tokens_per_round=700 algorithm.max_staleness=5" in (
        " ".join(capsys.readouterr().out.split())
    )
    assert run(monkeypatch, *args, "--lengths", "nowhere") == 2
    assert "--lengths nowhere is neither" in capsys.readouterr().err


def test_lengths_need_phases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(f"model: {{path: {MODEL}}}\npolicy: {{tp: 8, cp: 4}}\n")
    assert run(monkeypatch, tmp_path, "--lengths", "lognormal") == 2
    assert "--lengths is for the phases of RL" in capsys.readouterr().err
