"""Raw files, written by hand in their schema, against rows worked out by hand."""

import json
from typing import get_args

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from megatron_qlrl.cli import app
from megatron_qlrl.cli.data import FamilyName
from megatron_qlrl.data.builders.families import FAMILIES, build_family
from megatron_qlrl.errors import DataError
from megatron_qlrl.reward.rules import check_gold

MUSIQUE = {
    "id": "2hop__1_2",
    "paragraphs": [
        {"idx": 0, "title": "Ada", "paragraph_text": "Born in Rome.", "is_supporting": True},
        {"idx": 1, "title": "Bob", "paragraph_text": "A builder.", "is_supporting": False},
    ],
    "question": "Where was Ada born?",
    "question_decomposition": [],
    "answer": "Rome",
    "answer_aliases": ["Roma"],
    "answerable": True,
}
OTHER = MUSIQUE | {
    "id": "2hop__3_4",
    "question": "What is Cy?",
    "answer": "a cat",
    "paragraphs": [
        {"idx": 0, "title": "Cy", "paragraph_text": "A cat.", "is_supporting": True},
        MUSIQUE["paragraphs"][1],
    ],
}
CORPUS = [
    {
        "title": f"T{n}",
        "author": None,
        "source": "The Post",
        "published_at": "2023-10-01",
        "category": "tech",
        "url": f"https://x/{n}",
        "body": f"Body {n}.",
    }
    for n in range(4)
]
QUERY = {
    "query": "Did The Post praise both?",
    "answer": "Yes",
    "question_type": "comparison_query",
    "evidence_list": [
        {"title": "T2", "url": "https://x/2", "fact": "f"},
        {"title": "T0", "url": "https://x/0", "fact": "g"},
        {"title": "T2", "url": "https://x/2", "fact": "h"},
    ],
}
DOCMATH = {
    "question_id": "complong-train-0",
    "source": "any",
    "question": "What is the sum?",
    "paragraphs": ["One is 1.", "| a | 2 |"],
    "table_evidence": [1],
    "paragraph_evidence": [0],
    "python_solution": "",
    "ground_truth": 3.5,
}
CHOICE = {
    "document": "The insurer pays on fire.",
    "question": "When does it pay? ",
    "options": ["On flood", " On fire", "Never"],
    "answer": "B",
}


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.suffix == ".json"
    text = json.dumps(list(records)) if whole else "\n".join(map(json.dumps, records))
    path.write_text(text, encoding="utf-8")
    return path


def build(name, source, tmp_path, *, distractors=0, seed=0, out="out"):
    target = tmp_path / f"{out}.parquet"
    number = build_family(
        name, source, target, distractors=distractors, seed=seed, split="train",
        check_gold=check_gold,
    )  # fmt: skip
    rows = pq.read_table(target).to_pylist()
    assert number == len(rows)
    return rows


def musique_file(tmp_path):
    return write(tmp_path / "raw" / "musique_ans_v1.0_train.jsonl", MUSIQUE, OTHER).parent


def test_musique_without_distractors(tmp_path):
    first, second = build("musique", musique_file(tmp_path), tmp_path)
    assert first == {
        "data_source": "musique",
        "prompt": [
            {
                "role": "user",
                "content": "Read the text below and answer the question that follows it.\n\n"
                "<text>\nAda\nBorn in Rome.\n\nBob\nA builder.\n</text>\n\nWhere was Ada born?\n\n"
                "End your response with this sentence, your answer in the brackets: "
                '"Therefore, the answer is (insert answer here)".',
            }
        ],
        "ability": "docqa",
        "reward_model": {"style": "rule", "ground_truth": "Rome"},
        "extra_info": {"split": "train", "index": 0, "id": "2hop__1_2"},
        "document": "Ada\nBorn in Rome.\n\nBob\nA builder.",
        "question": "Where was Ada born?",
    }
    assert second["extra_info"]["index"] == 1


def test_musique_with_distractors_of_other_questions(tmp_path):
    source = musique_file(tmp_path)
    rows = build("musique", source, tmp_path, distractors=5)
    # Three paragraphs in all: each question lacks one of them, and gets no text twice.
    for row in rows:
        parts = row["document"].split("\n\n")
        assert sorted(parts) == ["Ada\nBorn in Rome.", "Bob\nA builder.", "Cy\nA cat."]
    assert build("musique", source, tmp_path, distractors=5, out="again") == rows


def test_order_hangs_on_the_seed_and_as_many_distractors_come_as_asked_for(tmp_path):
    paragraphs = [
        {"title": f"T{n}", "paragraph_text": f"text {n}", "is_supporting": False} for n in range(30)
    ]
    source = write(
        tmp_path / "raw.jsonl",
        MUSIQUE,
        *[OTHER | {"id": f"o{n}", "paragraphs": paragraphs[n : n + 3]} for n in range(0, 30, 3)],
    )
    documents = {
        seed: build("musique", source, tmp_path, distractors=7, seed=seed)[0]["document"]
        for seed in range(3)
    }
    assert len(set(documents.values())) == 3
    for document in documents.values():
        parts = document.split("\n\n")
        assert len(parts) == len(set(parts)) == 9
        assert {"Ada\nBorn in Rome.", "Bob\nA builder."} < set(parts)


def test_unanswerable_questions_are_left_out(tmp_path):
    source = write(tmp_path / "raw.jsonl", MUSIQUE, OTHER | {"answerable": False})
    rows = build("musique", source, tmp_path)
    assert [row["extra_info"]["id"] for row in rows] == ["2hop__1_2"]


def multihoprag(tmp_path, *queries):
    write(tmp_path / "raw" / "MultiHopRAG.json", *queries)
    return write(tmp_path / "raw" / "corpus.json", *CORPUS).parent


def test_multihoprag_takes_each_article_of_the_evidence_once(tmp_path):
    (row,) = build("multihoprag", multihoprag(tmp_path, QUERY), tmp_path)
    assert row["document"] == (
        "T2\nThe Post, 2023-10-01\nBody 2.\n\nT0\nThe Post, 2023-10-01\nBody 0."
    )
    assert (row["data_source"], row["question"]) == ("multihoprag", "Did The Post praise both?")
    assert row["reward_model"]["ground_truth"] == "Yes"
    assert row["extra_info"] == {
        "split": "train", "index": 0, "question_type": "comparison_query",
    }  # fmt: skip


def test_multihoprag_with_distractors_and_without_evidence(tmp_path):
    empty = QUERY | {
        "evidence_list": [], "question_type": "null_query", "answer": "Insufficient information.",
    }  # fmt: skip
    first, second = build(
        "multihoprag", multihoprag(tmp_path, QUERY, empty), tmp_path, distractors=1
    )
    titles = sorted(part.split("\n")[0] for part in first["document"].split("\n\n"))
    assert titles[0] == "T0"
    assert "T2" in titles
    assert len(titles) == 3
    assert second["document"].count("Body") == 1
    with pytest.raises(DataError, match=r"MultiHopRAG\.json, item 1: .* ask for distractors"):
        build("multihoprag", multihoprag(tmp_path, QUERY, empty), tmp_path)


def test_docmath(tmp_path):
    (row,) = build("docmath", write(tmp_path / "raw" / "train.json", DOCMATH).parent, tmp_path)
    assert row["document"] == "One is 1.\n| a | 2 |"
    assert row["reward_model"]["ground_truth"] == "3.5"
    assert row["data_source"] == "docmath"
    assert row["extra_info"] == {"split": "train", "index": 0, "id": "complong-train-0"}


@pytest.mark.parametrize(
    "options", [CHOICE["options"], dict(zip("ABC", CHOICE["options"], strict=True))]
)
def test_choice(tmp_path, options):
    source = write(tmp_path / "legal.jsonl", CHOICE | {"options": options})
    (row,) = build("choice", source, tmp_path)
    assert row["question"] == "When does it pay?\n\n(A) On flood\n(B) On fire\n(C) Never"
    assert row["reward_model"]["ground_truth"] == "B"
    assert row["data_source"] == "long_toc_choices"
    assert row["prompt"][0]["content"].endswith('"The correct answer is (insert letter here)".')


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("choice", CHOICE | {"answer": "D"}, "line 1: `answer` must be one of A, B, C, found 'D'"),
        ("choice", CHOICE | {"answer": "On fire"}, "must be one of A, B, C"),
        ("choice", CHOICE | {"options": ["one"]}, "`options` must be a list of two to 26 texts"),
        ("choice", CHOICE | {"options": {"A": "x", "C": "y"}}, "`options` must be a list"),
        ("choice", CHOICE | {"options": ["x", 5]}, "`B` must be a text"),
        ("choice", CHOICE | {"options": ["x"] * 27}, "`options` must be a list of two to 26"),
        ("docmath", DOCMATH | {"ground_truth": "3"}, "`ground_truth` must be a number"),
        ("docmath", DOCMATH | {"paragraphs": []}, "`paragraphs` must be a list of texts"),
        ("musique", MUSIQUE | {"paragraphs": None}, "`paragraphs` must be a list"),
        ("musique", MUSIQUE | {"paragraphs": ["x"]}, "`title` must be a text"),
        ("musique", MUSIQUE | {"answer": " "}, "`answer` must be a text"),
        ("musique", MUSIQUE | {"answerable": False}, "holds no questions of musique"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, record, message):
    with pytest.raises(DataError, match=message):
        build(name, write(tmp_path / "raw.jsonl", record), tmp_path)
    assert not (tmp_path / "out.parquet").exists()


def test_missing_files_and_articles_are_named(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match=r"has no file musique_ans_v1\.0_train\.jsonl or"):
        build("musique", tmp_path / "raw", tmp_path)
    with pytest.raises(DataError, match=r"pass the folder with MultiHopRAG\.json"):
        build("multihoprag", write(tmp_path / "raw" / "MultiHopRAG.json", QUERY), tmp_path)
    lost = QUERY | {"evidence_list": [{"url": "https://x/9"}]}
    with pytest.raises(DataError, match=r"corpus\.json has no article https://x/9"):
        build("multihoprag", multihoprag(tmp_path, lost), tmp_path)


def test_command_knows_every_family(tmp_path):
    assert set(get_args(FamilyName)) == set(FAMILIES)
    source, out = write(tmp_path / "legal.jsonl", CHOICE), tmp_path / "new" / "choice.parquet"
    done = CliRunner().invoke(app, ["data", "family", "choice", str(source), str(out)])
    assert (done.exit_code, done.output.replace("\n", "")) == (0, f"1 rows: {out}")
