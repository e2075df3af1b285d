"""The document itself is searched for the answer, by code that knows only what a question means."""

import re
from collections import Counter
from typing import get_args

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from megatron_qlrl.cli import app
from megatron_qlrl.cli.data import RulerTask as CommandTask
from megatron_qlrl.data.builders.ruler import RulerTask, build_ruler
from megatron_qlrl.data.template import docqa_message, render
from megatron_qlrl.data.tokenizer import load_tokenizer
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.reward.rules import check_gold
from megatron_qlrl.reward.score import score_response

TASKS = get_args(RulerTask)
MODEL = "examples/quickstart/base"


def count(text):
    return len(re.findall(r"\w+|[^\w\s]", text))


def build(tmp_path, task, tokens, num=3, seed=0):
    out = tmp_path / f"{task}.parquet"
    longest = build_ruler(out, task=task, tokens=tokens, num=num, seed=seed, count=count)
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == num
    assert longest == max(row["extra_info"]["tokens"] for row in rows)
    return rows


def niah(document, question):
    thing = re.fullmatch(r"What is (the number of the .*)\?", question)[1]
    return re.findall(f"(?i){thing} is ([0-9]+)", document)


def vt(document, question):
    held = re.search(r"value ([0-9]+)", question)[1]
    values, names = {}, []
    for name, value, other in re.findall(r"VAR (\w+) = (?:([0-9]+)|VAR (\w+))\.", document):
        values[name] = value or values[other]  # a copy stands after what it copies
        names += [name] if values[name] == held else []
    assert len(values) == 10
    return [", ".join(names)]


def cwe(document, question):
    ordered = Counter(line.split(". ")[1] for line in document.split("\n")).most_common()
    assert ordered[9][1] > ordered[10][1] == ordered[-1][1] == 3
    assert ordered[0][1] == ordered[9][1]
    return [", ".join(sorted(word for word, _ in ordered[:10]))]


def fwe(document, question):
    ordered = Counter(document.split()).most_common()
    assert ordered[0][1] > ordered[1][1] > ordered[2][1] > ordered[3][1]
    return [", ".join(word for word, _ in ordered[:3])]


def qa(document, question):
    name = re.fullmatch(r"What does (\w+) own\?", question)[1]
    return re.findall(rf"^{name} .* thing of value, the (.*)\.$", document, re.MULTILINE)


SOLVE = {"niah": niah, "vt": vt, "cwe": cwe, "fwe": fwe, "qa": qa}


@pytest.mark.parametrize("tokens", [512, 700, 1024, 3000, 20_000])
@pytest.mark.parametrize("task", TASKS)
def test_the_gold_is_what_the_document_says_and_no_other(tmp_path, task, tokens):
    for row in build(tmp_path, task, tokens):
        gold, source = row["reward_model"]["ground_truth"], row["data_source"]
        assert SOLVE[task](row["document"], row["question"]) == [gold]
        message = docqa_message(document=row["document"], question=row["question"], kind="qa")
        assert row["prompt"] == [{"role": "user", "content": message}]
        assert source == f"ruler_{task}"
        check_gold(source, gold)
        score = score_response(
            data_source=source,
            ground_truth=gold,
            response_text=f"Therefore, the answer is ({gold}).",
            reasoning_open=False,
        )
        assert score.value == 1.0


@pytest.mark.parametrize("tokens", [512, 5000, 131_072])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_as_long_as_asked(tmp_path, task, tokens):
    for row in build(tmp_path, task, tokens, num=2):
        length = count(row["prompt"][0]["content"])
        assert row["extra_info"]["tokens"] == length
        assert tokens - max(0.01 * tokens, 30) <= length <= tokens


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_names_the_rows(tmp_path, task):
    rows = build(tmp_path, task, 800)
    assert rows == build(tmp_path, task, 800)
    assert rows[:2] == build(tmp_path, task, 800, num=2)
    assert len({row["document"] for row in rows}) == 3
    assert rows[0]["document"] != build(tmp_path, task, 800, seed=1)[0]["document"]


def test_needles_lie_at_all_depths(tmp_path):
    depths = []
    for row in build(tmp_path, "niah", 2000, num=100):
        place = row["document"].index(row["reward_model"]["ground_truth"])
        depths.append(4 * place // len(row["document"]))
    assert min(Counter(depths)[quarter] for quarter in range(4)) >= 10


def test_too_few_tokens_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--tokens 50 is too small for vt, whose shortest"):
        build(tmp_path, "vt", 50)


def test_command_counts_with_the_models_tokenizer(tmp_path):
    out = tmp_path / "niah.parquet"
    argv = ["data", "ruler", str(out), "--task", "niah", "--tokens", "3000", "--num", "2"]
    done = CliRunner().invoke(app, [*argv, "--model", MODEL])
    assert done.exit_code == 0, done.output
    tokenizer = load_tokenizer(MODEL)
    lengths = [
        len(render(tokenizer, row["prompt"], None)) for row in pq.read_table(out).to_pylist()
    ]
    assert done.output == f"2 rows of at most {max(lengths)} tokens: {out}\n"
    assert all(2900 <= length <= 3000 for length in lengths)


def test_the_command_knows_every_task():
    assert get_args(CommandTask) == TASKS
