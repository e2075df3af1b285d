import json

import pyarrow.parquet as pq
import pytest

from megatron_qlrl.data.builders.docs import build_docs
from megatron_qlrl.data.template import docqa_message
from megatron_qlrl.errors import ConfigError, DataError
from megatron_qlrl.reward.rules import check_gold

QA = {"document": "a.txt", "question": "Who?", "answer": "me"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("alpha ü", encoding="utf-8")
    (tmp_path / "docs" / "b.txt").write_text("beta", encoding="utf-8")
    (tmp_path / "docs" / "bad.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "docs" / "empty.txt").write_text("\n", encoding="utf-8")
    (tmp_path / "secret.txt").write_text("outside", encoding="utf-8")
    return tmp_path


def build(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "q.jsonl").write_text(text, encoding="utf-8")
    out = folder / "out" / "docs.parquet"
    number = build_docs(
        documents_dir=folder / "docs",
        questions=folder / "q.jsonl",
        out=out,
        split="train",
        check_gold=check_gold,
    )
    rows = pq.read_table(out).to_pylist()
    assert number == len(rows)
    return rows


def test_a_line_becomes_a_verl_row(folder):
    message = docqa_message(document="alpha ü", question="Who?", kind="qa")
    assert build(folder, QA) == [
        {
            "data_source": "docs_musique",
            "prompt": [{"role": "user", "content": message}],
            "ability": "docqa",
            "reward_model": {"style": "rule", "ground_truth": "me"},
            "extra_info": {"split": "train", "index": 0},
            "document": "alpha ü",
            "question": "Who?",
        }
    ]


def test_kinds_select_closing_sentence_and_source(folder):
    rows = build(
        folder,
        QA | {"kind": "math", "answer": 1.5},
        "",
        QA | {"kind": "choice", "answer": "B"},
        QA | {"data_source": "my_qasper"},
    )
    assert [row["data_source"] for row in rows] == [
        "docs_docmath",
        "docs_long_toc_choices",
        "my_qasper",
    ]
    assert [row["reward_model"]["ground_truth"] for row in rows] == ["1.5", "B", "me"]
    assert [row["extra_info"]["index"] for row in rows] == [0, 1, 2]
    assert "The correct answer is" in rows[1]["prompt"][0]["content"]
    assert "The correct answer is" not in rows[0]["prompt"][0]["content"]


def test_several_documents_are_joined_in_order(folder):
    (row,) = build(folder, QA | {"document": ["b.txt", "a.txt"]})
    assert row["document"] == "beta\n\nalpha ü"


def test_responses_make_an_sft_file(folder):
    rows = build(folder, QA | {"response": "r1"}, QA | {"response": "r2"})
    assert [row["response"] for row in rows] == ["r1", "r2"]
    with pytest.raises(DataError, match="line 2: give `response` on every line"):
        build(folder, QA | {"response": "r1"}, QA)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not JSON"),
        ("[1]", "expected an object {...}, found list"),
        ({"document": "a.txt"}, "missing question, answer; the keys are document, question"),
        (QA | {"anser": "x"}, "unknown anser; the keys are"),
        (QA | {"question": " "}, "`question` must be a string that is not empty"),
        (QA | {"answer": None}, "`answer` must be a string that is not empty"),
        (QA | {"answer": True}, "`answer` must be a string"),
        (QA | {"kind": "essay"}, "kind 'essay' is not one of qa, math, choice"),
        (QA | {"document": "c.txt"}, "cannot read .*c.txt as UTF-8 text"),
        (QA | {"document": "bad.txt"}, "cannot read .*bad.txt as UTF-8 text"),
        (QA | {"document": "."}, "cannot read"),
        (QA | {"document": "\0"}, "`document` must be a file name or a list"),
        (QA | {"document": "empty.txt"}, "document 'empty.txt' is empty"),
        ('{"document": "a.txt", "question": "\\ud800", "answer": "x"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"document": "a.txt", "question": "Who?", "answer": ' + "[" * 100_000, "not JSON"),
        (QA | {"data_source": "gsm8k"}, "data_source 'gsm8k' has no rule; its name must"),
        (QA | {"kind": "choice", "answer": "the first"}, "'the first' to a question of multiple"),
        (QA | {"data_source": "my_long_toc_choices"}, "names no option; give its letter"),
        (QA | {"document": []}, "`document` must be a file name or a list"),
        (QA | {"document": 5}, "`document` must be a file name or a list"),
        (QA | {"document": "../secret.txt"}, "'../secret.txt' lies outside"),
        (QA | {"document": "/etc/hostname"}, "lies outside"),
    ],
)
def test_a_bad_line_is_named(folder, line, message):
    with pytest.raises(DataError, match=f"q.jsonl, line 2: .*{message}"):
        build(folder, QA, line)


def test_missing_inputs_are_named(folder):
    with pytest.raises(DataError, match="holds no questions"):
        build(folder, "")
    with pytest.raises(DataError, match="document folder .*nowhere does not exist"):
        build_docs(
            documents_dir=folder / "nowhere",
            questions=folder / "q.jsonl",
            out=folder / "o.parquet",
            split="train",
            check_gold=check_gold,
        )
    with pytest.raises(DataError, match="cannot read .*gone.jsonl"):
        build_docs(
            documents_dir=folder / "docs",
            questions=folder / "gone.jsonl",
            out=folder / "o.parquet",
            split="train",
            check_gold=check_gold,
        )


@pytest.mark.parametrize("name", ["q.jsonl", "docs/a.txt"])
def test_an_input_is_not_overwritten(folder, name):
    (folder / "q.jsonl").write_text(json.dumps(QA), encoding="utf-8")
    before = (folder / name).read_bytes()
    (folder / "out.parquet").symlink_to(folder / name)
    with pytest.raises(ConfigError, match="the same file as the input"):
        build_docs(
            documents_dir=folder / "docs",
            questions=folder / "q.jsonl",
            out=folder / "out.parquet",
            split="train",
            check_gold=check_gold,
        )
    assert (folder / name).read_bytes() == before


def test_a_folder_that_takes_no_file(folder):
    (folder / "q.jsonl").write_text(json.dumps(QA), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"secret\.txt' cannot be made"):
        build_docs(
            documents_dir=folder / "docs",
            questions=folder / "q.jsonl",
            out=folder / "secret.txt" / "o.parquet",
            split="train",
            check_gold=check_gold,
        )
