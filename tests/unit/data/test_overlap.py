"""Overlap of rows written by hand; shares are fractions counted on paper."""

import json
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from megatron_qlrl.cli import app
from megatron_qlrl.data import overlap as module
from megatron_qlrl.data.dataset import TextRow
from megatron_qlrl.data.overlap import Pair, data_overlap, overlap_lines
from megatron_qlrl.data.words import ngram_hashes, words_of


def texts(name, *documents, question=""):
    return [
        TextRow(f"{name}:{i}", "x_musique", [], text, question, "gold", None)
        for i, text in enumerate(documents)
    ]


def documents_of(train, held_out, *, n=3, threshold=0.5):
    result = data_overlap(
        lambda: iter(train), lambda: iter(held_out), ngrams={"document": n}, threshold=threshold
    )
    return result["document"]


def test_the_same_text_in_other_dress():
    overlap = documents_of(
        texts("train", "other words here", "A, b  C.", "a b c"), texts("eval", "a-B c", "x y z")
    )
    assert overlap.exact == [Pair("eval:0", "train:1", 1.0)]
    assert overlap.ngram == []
    assert (overlap.rows, overlap.texts, overlap.sampled) == (2, 2, 0)
    assert overlap.levels == {"0.1": 1, "0.5": 1, "0.9": 1}


def test_share_is_that_of_the_shorter_text():
    # a b c d e f: abc bcd cde def. The train text has abc bcd cdx dxy: 2 of 4.
    assert documents_of(texts("t", "a b c d x y"), texts("e", "a b c d e f")).ngram == [
        Pair("e:0", "t:0", 0.5)
    ]
    # Train "b c d" is one 3-gram, and the held-out text has it: the whole of the shorter one.
    assert documents_of(texts("t", "b c d"), texts("e", "a b c d e f")).ngram == [
        Pair("e:0", "t:0", 1.0)
    ]
    # The other way round.
    assert documents_of(texts("t", "a b c d e f"), texts("e", "b c d")).ngram == [
        Pair("e:0", "t:0", 1.0)
    ]
    # A text repeats itself: distinct n-grams count, aba bab, and train has both.
    assert documents_of(texts("t", "x a b a b y"), texts("e", "a b a b a b")).ngram == [
        Pair("e:0", "t:0", 1.0)
    ]


def test_levels_and_the_best_row():
    # Ten 1-grams; the train rows share 1, 6, 3 and 2 of them, and have ten or more of their own.
    held_out = texts("e", "a b c d e f g h i j")
    own = " ".join(f"w{i}" for i in range(20))
    train = texts("t", f"a {own}", f"a b c d e f {own}", f"a b c {own}", f"i j {own}")
    overlap = documents_of(train, held_out, n=1, threshold=0.55)
    assert overlap.ngram == [Pair("e:0", "t:1", 0.6)]
    assert overlap.levels == {"0.1": 1, "0.5": 1, "0.9": 0}
    assert documents_of(train, held_out, n=1, threshold=0.61).ngram == []


def test_rows_with_one_document_are_all_named():
    overlap = documents_of(texts("t", "a b c"), texts("e", "a b c", "A B C", "d", ""))
    assert overlap.exact == [Pair("e:0", "t:0", 1.0), Pair("e:1", "t:0", 1.0)]
    assert (overlap.rows, overlap.texts) == (4, 2)


def test_texts_shorter_than_an_ngram_are_compared_as_a_whole():
    overlap = documents_of(texts("t", "a b", "c d"), texts("e", "A b", "c e"), n=3)
    assert overlap.exact == [Pair("e:0", "t:0", 1.0)]
    assert overlap.ngram == []


def test_scripts_without_spaces():
    assert words_of("東京は12番。Él") == ["東", "京", "は", "12", "番", "él"]


def test_hashes_are_the_same_in_every_process():
    a, b = (int.from_bytes(blake2b(w, digest_size=8).digest(), "little") for w in (b"a", b"b"))
    mask = 2**64 - 1
    value = (a * 0x9E3779B97F4A7C15 + b) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    assert ngram_hashes(["a", "b"], 2).tolist() == [value ^ (value >> 31)]


def test_a_long_text_is_sampled_and_the_share_is_close():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in rng.integers(0, 10**9, 60_000)]
    half = [*words[:30_000], *(f"x{i}" for i in range(60_000))]
    overlap = documents_of(
        texts("t", " ".join(half)), texts("e", " ".join(words)), n=13, threshold=0.4
    )
    assert overlap.sampled == 1
    # The standard error with at least 2,048 sampled n-grams is at most 1.1 points.
    assert overlap.ngram[0].share == pytest.approx(0.5, abs=0.04)


def test_the_index_is_bounded_whatever_the_files(monkeypatch):
    monkeypatch.setattr(module, "MAX_NGRAMS", 6400)
    sizes = []
    join = module._Index._join

    def spied(self):
        joined = join(self)
        sizes.append(len(joined[0]))
        return joined

    monkeypatch.setattr(module._Index, "_join", spied)
    documents = [" ".join(f"d{n}w{i}" for i in range(3000)) for n in range(100)]
    overlap = documents_of(texts("t", *documents[:3]), texts("e", *documents))
    assert overlap.sampled == 100
    assert 0 < max(sizes) <= 6400
    assert [pair.eval_row for pair in overlap.exact] == ["e:0", "e:1", "e:2"]


def test_table():
    train = texts("t", *[f"a b c d {n}" for n in range(12)])
    held_out = texts("e", *[f"A b c d {n}" for n in range(12)], "x a b c")
    overlaps = data_overlap(
        lambda: train, lambda: held_out, ngrams={"document": 3, "question": 3}, threshold=0.5
    )
    lines = overlap_lines(overlaps, threshold=0.5)
    assert lines[0].split()[:8] == ["exact", ">=", "10%", ">=", "50%", ">=", "90%", "of"]
    assert lines[1].split() == ["documents", "12", "13", "13", "12"]
    assert lines[2].split() == ["questions", "0", "0", "0", "0"]
    assert lines[3:5] == ["documents, the same:", "  e:0 ~ t:0  100.0%"]
    assert "  and 2 more (--json lists all)" in lines
    assert lines[-2:] == ["documents, at least 50% shared:", "  e:12 ~ t:0  50.0%"]


def test_command(tmp_path):
    def row(document, question):
        return {
            "data_source": "x_musique",
            "prompt": [{"role": "user", "content": "?"}],
            "reward_model": {"style": "rule", "ground_truth": "x"},
            "document": document,
            "question": question,
        }

    for name, *rows in (("train", row("a b", "Who is it?")), ("eval", row("c", "who is it"))):
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "same.parquet")
    folders = [str(tmp_path / name) for name in ("train", "eval")]
    done = CliRunner().invoke(app, ["data", "overlap", *folders, "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.output)
    assert shown["question"]["exact"] == [
        {"eval_row": "same:0", "train_row": "same:0", "share": 1.0}
    ]
    assert shown["document"]["exact"] == []
    done = CliRunner().invoke(app, ["data", "overlap", *folders])
    assert "questions, the same:" in done.output
    assert done.exit_code == 0
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(app, ["data", "overlap", str(tmp_path / "empty"), folders[1]])
    assert "holds no parquet file" in str(done.exception)
