import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_qlrl.config.load import load_config

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "ablations"


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's modules, which are scripts beside each other."""
    monkeypatch.syspath_prepend(FOLDER)
    import arms  # pyright: ignore[reportMissingImports]
    import report  # pyright: ignore[reportMissingImports]

    yield arms, report
    for name in ("arms", "report", "studies"):
        sys.modules.pop(name)


def test_arms_are_the_whole_grid_and_the_trade_off(ablations: Any) -> None:
    arms, _ = ablations
    names = {arm.name for arm in arms.ARMS}
    assert len(names) == len(arms.ARMS) == 2 * 4 + 1
    assert {"base-single", "sft-phased", "long_sft-phased"} <= names


def test_settings_of_an_arm_make_the_config_it_names(ablations: Any) -> None:
    arms, _ = ablations
    configs = {a.name: load_config(FOLDER / "config.yaml", a.settings) for a in arms.ARMS}
    single, phased = configs["sft-single"], configs["sft-phased"]
    assert [(p.max_input_tokens, p.steps) for p in single.phases] == [(3500, 68)]
    assert [(p.max_input_tokens, p.steps) for p in phased.phases] == [
        (250, 40),
        (800, 40),
        (3500, 45),
    ]
    assert {a.curriculum for a in arms.ARMS if a.train_file == "train_longer"} == {"single"}
    shares = {name: c.curriculum.carried_share for name, c in configs.items()}
    assert {n for n, s in shares.items() if s > 0} == {n for n in shares if "retrospective" in n}


def write_record(folder: Path, *, start: float, right: list[int]) -> None:
    """Two steps of 100 and 300 tokens, evaluations before and after, which answers ten questions of
    each size: `right` of them right, by size."""
    sizes = ("short", "long", "longer")
    before = {f"val/eval_{size}/score": start for size in sizes}
    after = {f"val/eval_{size}/score": num / 10 for size, num in zip(sizes, right, strict=True)}
    step = {"critic/rewards/mean": 0.5, "actor/entropy": 0.2}
    lines = [
        {"step": 0, **before},
        {"step": 0, "perf/total_num_tokens": 100, "actor/kl_loss": 0.75, **step},
        {"step": 1, "perf/total_num_tokens": 300, "actor/kl_loss": 0.25, **step},
        {"step": 1, **after},
    ]
    answers = [
        {"uid": f"eval_{size}:{i}", "score": float(i < num)}
        for size, num in zip(sizes, right, strict=True)
        for i in range(10)
    ]
    (folder / "eval").mkdir(parents=True)
    for file, records in (("metrics.jsonl", lines), ("eval/longer.jsonl", answers)):
        (folder / file).write_text("".join(json.dumps(record) + "\n" for record in records))


def test_report_of_records(ablations: Any, tmp_path: Path) -> None:
    arms, report = ablations
    for arm in arms.ARMS:
        extra = 5 if arm.curriculum == "phased" else 0
        for seed, long in enumerate((3, 4)):
            write_record(
                tmp_path / arm.name / f"seed_{seed}", start=0.1, right=[2 * long, long, extra]
            )
    report.report(tmp_path, range(2))
    table = (tmp_path / "report" / "table.md").read_text().splitlines()
    # 60 % and 80 % on short documents, 30 % and 40 % on long ones: sample deviations of
    # sqrt(200) = 14.1, sqrt(50) = 7.1; of their means 30 % and 40 %, 7.1.
    assert table[2] == (
        "| no SFT | single | 70.0 ± 14.1 | 35.0 ± 7.1 | 0.0 ± 0.0 | 35.0 ± 7.1 | "
        "0.200 ± 0.000 | 0.500 ± 0.000 | 0.75 | 0.00 ± 0.00 |"
    )
    none = "+0.0 (+0.0 to +0.0)"
    row = next(line for line in table if line.startswith("| SFT | phased minus single |"))
    # Five of ten documents, in both seeds: +50 points, and two documents each way to be expected.
    assert row.startswith(f"| SFT | phased minus single | {none} | {none} | +50.0 (+20.0 to +80.0")
    assert table[-1] == (
        "| 120 | 10.0 ± 0.0 | 70.0 ± 14.1 | 10.0 ± 0.0 | 35.0 ± 7.1 | 10.0 ± 0.0 | 50.0 ± 0.0 | "
        "41.7 ± 7.1 |"
    )
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [run["tokens"] for run in results["base-single"]] == [400, 400]
    for name in ("curves_sft.png", "curves_base.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_curve_is_over_the_tokens_used_so_far(ablations: Any) -> None:
    _, report = ablations
    record = [
        {"val/eval_long/score": 0.1},
        {"perf/total_num_tokens": 100, "actor/kl_loss": 0.5},
        {"perf/total_num_tokens": 300, "actor/kl_loss": 0.3},
        {"val/eval_long/score": 0.4},
    ]
    tokens, values = report.curve(record, "val/eval_long/score")
    assert (tokens.tolist(), values.tolist()) == ([0, 400], [0.1, 0.4])
    tokens, values = report.curve(record, "actor/kl_loss")
    assert tokens.tolist() == [100, 400]
    assert values.tolist() == pytest.approx([0.5, 0.4])  # a running mean


@pytest.fixture
def curriculum(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    import curriculum  # pyright: ignore[reportMissingImports]

    yield curriculum
    for name in ("curriculum", "studies"):
        sys.modules.pop(name)


def test_arms_of_the_curriculum_take_the_same_number_of_steps(curriculum: Any) -> None:
    configs = {
        arm: load_config(curriculum.CONFIG, ["model.path=m", *settings])
        for arm, settings in curriculum.ARMS.items()
    }
    assert {sum(p.steps for p in config.phases) for config in configs.values()} == {24}
    shares = {arm: config.curriculum.carried_share for arm, config in configs.items()}
    assert shares == {"phased": 0.0, "retrospective": 0.25, "single": 0.0}


def test_arms_are_compared_seed_by_seed_and_question_by_question(
    curriculum: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # By hand: phased is right on 3 of 4 and 4 of 4 long documents, single on 1 and 2 of the same.
    long = {"sft-phased": ([1, 1, 1, 0], [1, 1, 1, 1]), "sft-single": ([0, 0, 1, 0], [0, 0, 1, 1])}
    for arm, seeds in long.items():
        for seed, scores in enumerate(seeds):
            file = tmp_path / f"seed_{seed}" / arm / "eval" / "long.jsonl"
            file.parent.mkdir(parents=True)
            records = [{"uid": f"eval_long:{i}", "score": s} for i, s in enumerate(scores)]
            records += [{"uid": f"eval_short:{i}", "score": 1} for i in range(2)]
            file.write_text("".join(json.dumps(r) + "\n" for r in records))
    curriculum.report(tmp_path, [0, 1, 2])
    lines = capsys.readouterr().out.splitlines()
    assert "| sft-phased | 2 | 100.0 ± 0.0 | 87.5 ± 17.7 |" in lines
    assert "| sft-single | 2 | 100.0 ± 0.0 | 37.5 ± 17.7 |" in lines
    assert lines[-1].startswith("| sft-phased minus sft-single | 2 | +0.0 (+0.0 to +0.0) | +50.0 (")
    # Two of four documents differ in each seed: the mean of four draws lies between 0 and 100.
    assert lines[-1].endswith("(+0.0 to +100.0) |")


@pytest.fixture
def forgetting(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    import forgetting  # pyright: ignore[reportMissingImports]

    yield forgetting
    for name in ("forgetting", "studies"):
        sys.modules.pop(name)


def test_arms_of_forgetting_change_phase_2_alone(forgetting: Any) -> None:
    configs = {
        arm: load_config(forgetting.CONFIG, settings).phase_configs()
        for arm, settings in forgetting.ARMS.items()
    }
    for arm, (first, second) in configs.items():
        assert (first.optimizer.lr, first.algorithm.kl_coef) == (8e-4, 0), arm
        assert second.curriculum.carried_share == 0.0 or "KL" not in arm
    second = {arm: phases[1] for arm, phases in configs.items()}
    assert second["learning rate 2e-4, carried_share 0.5"].optimizer.lr == 2e-4
    assert second["KL with coefficient 0.1"].algorithm.kl_coef == 0.1
    shares = [phase.curriculum.carried_share for phase in second.values()]
    assert shares == [0, 0.25, 0.5, 0, 0.25, 0.5, 0]


def test_forgetting_is_measured_against_sft(
    forgetting: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # By hand: of two short documents phase 2 loses one, of two long ones it gains both.
    stages = {
        "sft/seed_0/eval/sft": ([1, 1], [0, 0]),
        "carried_share-0.25/seed_0/eval/phase1": ([1, 1], [0, 1]),
        "carried_share-0.25/seed_0/eval/phase2": ([1, 0], [1, 1]),
    }
    for name, scores in stages.items():
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        records = [
            {"uid": f"eval_{size}:{i}", "score": score}
            for size, values in zip(("short", "long"), scores, strict=True)
            for i, score in enumerate(values)
        ]
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    forgetting.report(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "| carried_share 0.25 | 0 | 100.0 / 0.0 | 100.0 / 50.0 | 50.0 / 100.0 |" in lines
    assert lines[-1] == (
        "| carried_share 0.25 | 1 | -50.0 (-100.0 to +0.0) | +100.0 (+100.0 to +100.0) |"
    )
