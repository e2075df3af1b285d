"""`data_stats` on rows written by hand; every number is counted on paper."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from megatron_qlrl.cli import app
from megatron_qlrl.data.dataset import iter_texts
from megatron_qlrl.data.stats import Lengths, data_stats, stats_lines
from megatron_qlrl.errors import DataError


def row(source, document, question, gold, **more):
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": f"Read. <text>{document}</text> {question}"}],
        "reward_model": {"style": "rule", "ground_truth": gold},
        **more,
    }


def write(path, *rows):
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


ROWS = (
    row("a_musique", "The sky is blue.", "What colour?", "blue"),
    row("a_musique", "the SKY  is blue", "What colour", "blue"),
    row("a_musique", "The sky is blue.", "What colour?", "green"),
    row("b_docmath", "It cost 5 francs in all of 1901.", "What colour?", "5"),
)
# Words of the prompts: read, text, text and 4 + 2 of the first three; 8 + 2 of the last.


def test_rows_lengths_and_repetitions(tmp_path):
    stats = data_stats(iter_texts([write(tmp_path / "t.parquet", *ROWS)]))
    assert stats.unit == "words"
    assert {name: own.rows for name, own in stats.sources.items()} == {
        "a_musique": 3,
        "b_docmath": 1,
        "all": 4,
    }
    assert stats.sources["a_musique"].prompts == Lengths(9.0, 9, 9, 9)
    assert stats.sources["all"].prompts == Lengths((9 * 3 + 13) / 4, 9, 9, 13)
    assert stats.sources["all"].responses is None
    assert stats.documents == 2
    assert stats.same_rows == [["t:0", "t:1", "t:2"]]
    assert stats.other_golds == [["t:0", "t:1", "t:2"]]
    assert stats.same_questions == [["t:0", "t:1", "t:2", "t:3"]]


def test_responses_tell_rows_apart_and_are_measured(tmp_path):
    rows = [
        row("a_musique", "The sky is blue.", "What colour?", "blue", response=text)
        for text in ("It is blue.", "Blue", "blue!")
    ]
    stats = data_stats(iter_texts([write(tmp_path / "t.parquet", *rows)]))
    assert stats.sources["all"].responses == Lengths(5 / 3, 1, 1, 3)
    assert stats.same_rows == [["t:1", "t:2"]]
    assert stats.other_golds == []


def test_texts_without_words_differ_by_their_signs(tmp_path):
    rows = [row("a_musique", "d", "What?", "x") | {"document": mark} for mark in ("+", "-", " ")]
    stats = data_stats(iter_texts([write(tmp_path / "t.parquet", *rows)]))
    assert stats.documents == 2
    assert stats.same_rows == []


def test_fields_come_before_tags(tmp_path):
    fields = {"document": "own document", "question": "own question"}
    rows = [
        row("a_musique", "in </text> between", "asked?", "x"),
        row("a_musique", "d", "q", "x") | {"prompt": [{"role": "user", "content": "no tags"}]},
        row("a_musique", "d", "q", "x", extra_info={"question": "extra"}),
    ]
    texts = [
        (text.uid, text.document, text.question)
        for index, each in enumerate([*rows, row("a_musique", "d", "q", "x") | fields])
        for text in iter_texts([write(tmp_path / f"f{index}.parquet", each)])
    ]
    assert texts == [
        ("f0:0", "in </text> between", "asked?"),
        ("f1:0", "no tags", "no tags"),
        ("f2:0", "d", "extra"),
        ("f3:0", "own document", "own question"),
    ]


def test_table_names_rows_and_says_what_it_leaves_out(tmp_path):
    rows = [row("a_musique", f"document {n // 2}", "What?", "x") for n in range(24)]
    lines = stats_lines(data_stats(iter_texts([write(tmp_path / "t.parquet", *rows)])))
    assert lines[0].split() == [
        "source", "rows", "mean", "median", "p90", "longest", "prompts,", "in", "words",
    ]  # fmt: skip
    assert lines[1].split() == ["a_musique", "24", "6", "6", "6", "6"]
    assert lines[3] == "12 different documents in 24 rows"
    assert lines[4] == "12 rows that are there before (document, question and response)"
    assert lines[5:7] == ["  t:0 = t:1", "  t:2 = t:3"]
    assert "  and 2 more groups (--json lists all)" in lines


def test_a_bad_row_is_named(tmp_path):
    bad = row("a_musique", "d", "q", "x") | {"prompt": []}
    with pytest.raises(DataError, match=r"t\.parquet, row 1: `prompt` must be a non-empty list"):
        data_stats(iter_texts([write(tmp_path / "t.parquet", ROWS[0], bad)]))


def test_command(tmp_path):
    file = write(tmp_path / "t.parquet", *ROWS)
    done = CliRunner().invoke(app, ["data", "stats", str(file)])
    assert done.exit_code == 0, done.output
    assert "a_musique" in done.output
    done = CliRunner().invoke(app, ["data", "stats", str(file), "--json"])
    shown = json.loads(done.output)
    assert shown["sources"]["all"]["prompts"]["mean"] == 10.0
    assert shown["same_rows"] == [["t:0", "t:1", "t:2"]]
