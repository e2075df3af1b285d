"""Official files, written by hand in their published schema, against rows worked out by hand."""

import json
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from megatron_qlrl.cli import app
from megatron_qlrl.cli.data import BenchmarkName
from megatron_qlrl.data.builders.benchmarks import BENCHMARKS, build_benchmark
from megatron_qlrl.errors import ConfigError, DataError
from megatron_qlrl.reward.rules import check_gold
from megatron_qlrl.reward.score import score_response

QA_PROMPT = (
    "Read the text below and answer the question that follows it.\n\n<text>\n{}\n</text>\n\n{}\n\n"
    "End your response with this sentence, your answer in the brackets: "
    '"Therefore, the answer is (insert answer here)".'
)
CHOICE_PROMPT = QA_PROMPT.partition("End")[0] + (
    "End your response with this sentence, the letter of the right option in the brackets: "
    '"The correct answer is (insert letter here)".'
)
LONGBENCH = {
    "input": " Who wrote it? ",
    "context": "Passage 1:\nAda wrote it.\n",
    "answers": ["Ada", "Ada King"],
    "length": 5,
    "dataset": "any",
    "language": "en",
    "all_classes": None,
    "_id": "7f",
}
CHOICE = {
    "_id": "66f3",
    "domain": "Single-Document QA",
    "sub_domain": "Legal",
    "difficulty": "hard",
    "length": "short",
    "question": "Which colour? ",
    "choice_A": "red",
    "choice_B": "green",
    "choice_C": "blue",
    "choice_D": " none",
    "answer": "C",
    "context": "It is blue.",
}
CHAT = [
    {"role": "user", "content": "Write a poem about tapirs"},
    {"role": "assistant", "content": "Tapirs\nroam"},
    {"role": "user", "content": "Prepend x9 to the first poem about tapirs."},
]
MRCR = {
    "prompt": json.dumps(CHAT),
    "answer": "x9Tapirs\nroam",
    "random_string_to_prepend": "x9",
    "n_needles": 2,
    "desired_msg_index": 1,
    "total_messages": 3,
    "n_chars": 80,
}
PAGES = [{"title": "Ada", "text": "A countess."}, {"title": "Bob", "text": "A builder."}]
FRAMES = {"Prompt": "Who builds?", "Answer": "Bob", "wiki_items": PAGES}
REPORT = {
    "table": {"uid": "t", "table": [["", "2019"], ["Other", "44.1"]]},
    "paragraphs": [
        {"uid": "p2", "order": 2, "text": "In millions."},
        {"uid": "p1", "order": 1, "text": "Sales fell."},
    ],
    "questions": [],
}


def asked(answer, form, scale, uid="q"):
    return {
        "uid": uid,
        "order": 1,
        "question": "How much?",
        "answer": answer,
        "derivation": "",
        "answer_type": form,
        "scale": scale,
    }


def docmath(number, gold):
    return {
        "question_id": f"q{number}",
        "source": "any",
        "question": f"What is value {number}?",
        "paragraphs": [f"value {number}", "| a | b |"],
        "table_evidence": [1],
        "paragraph_evidence": [],
        "python_solution": "def solution(): ...",
        "ground_truth": gold,
    }


def lines(path, *records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def build(name, source, tmp_path):
    out = tmp_path / "out" / f"{name}.parquet"
    number = build_benchmark(name, source, out, check_gold=check_gold)
    rows = pq.read_table(out).to_pylist()
    assert number == len(rows)
    return rows


def row(source, message, gold, document, question, **extra):
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": message}],
        "ability": "docqa",
        "reward_model": {"style": "rule", "ground_truth": gold},
        "extra_info": {"split": "test", **extra},
        "document": document,
        "question": question,
    }


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("2wikimqa", "longbench_2wikimultihopqa"),
        ("hotpotqa", "longbench_hotpotqa"),
        ("musique", "longbench_musique"),
        ("narrativeqa", "longbench_narrativeqa"),
        ("qasper", "longbench_qasper"),
    ],
)
def test_longbench_takes_the_first_answer(tmp_path, name, source):
    lines(tmp_path / "data" / f"{name}.jsonl", LONGBENCH)
    document, question = "Passage 1:\nAda wrote it.", "Who wrote it?"
    message = QA_PROMPT.format(document, question)
    wanted = [row(source, message, "Ada", document, question, index=0, id="7f")]
    assert build(name, tmp_path / "data", tmp_path) == wanted
    assert build(name, tmp_path / "data" / f"{name}.jsonl", tmp_path) == wanted


def test_longbench_v2_keeps_difficulty_and_length(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([CHOICE]))
    question = "Which colour?\n\n(A) red\n(B) green\n(C) blue\n(D) none"
    assert build("longbench_v2", tmp_path / "data.json", tmp_path) == [
        row(
            "longbench_v2_long_toc_choices",
            CHOICE_PROMPT.format("It is blue.", question),
            "C",
            "It is blue.",
            question,
            index=0,
            id="66f3",
            domain="Single-Document QA",
            difficulty="hard",
            length="short",
        )
    ]


def test_frames_joins_titles_and_texts(tmp_path):
    lines(tmp_path / "frames" / "test.jsonl", FRAMES)
    document = "Ada\nA countess.\nBob\nA builder."
    message = QA_PROMPT.format(document, "Who builds?")
    wanted = [row("frames", message, "Bob", document, "Who builds?", index=0)]
    assert build("frames", tmp_path / "frames", tmp_path) == wanted


def docmath_folder(tmp_path):
    folder = tmp_path / "docmath"
    lines(folder / "complong_testmini.jsonl", docmath(1, 32.4), docmath(2, -5))
    (folder / "compshort_testmini.json").parent.mkdir(exist_ok=True)
    (folder / "compshort_testmini.json").write_text(json.dumps([docmath(3, 1e-5)]))
    lines(folder / "simplong_testmini.jsonl", docmath(4, 0.0))
    lines(folder / "simpshort_testmini.jsonl", docmath(5, 1999.0))
    return folder


def test_docmath_has_all_four_parts(tmp_path):
    rows = build("docmath_all", docmath_folder(tmp_path), tmp_path)
    document, question = "value 2\n| a | b |", "What is value 2?"
    message = QA_PROMPT.format(document, question)
    extra = {"index": 1, "id": "q2", "part": "complong"}
    assert rows[1] == row("docmath", message, "-5", document, question, **extra)
    golds = [r["reward_model"]["ground_truth"] for r in rows]
    assert golds == ["32.4", "-5", "1e-05", "0.0", "1999.0"]
    parts = [r["extra_info"]["part"] for r in rows]
    assert parts == ["complong", "complong", "compshort", "simplong", "simpshort"]


def test_docmath_of_the_paper_needs_question_and_document_in_one_prompt(tmp_path):
    folder = docmath_folder(tmp_path)
    chosen = [
        "<text> value 4\n| a | b | </text> What is value 4?",
        "<text> value 1\n| a | b | </text> What is value 2?",
        "<text> value 5\n| a | b | </text> What is value 5? More.",
    ]
    prompts = [{"prompt": [{"role": "user", "content": text}]} for text in chosen]
    lines(folder / "docmath_all_test_200.jsonl", *prompts)
    rows = build("docmath", folder, tmp_path)
    assert [r["extra_info"]["id"] for r in rows] == ["q4", "q5"]
    assert [r["extra_info"]["index"] for r in rows] == [0, 1]


def test_mrcr_keeps_the_conversation(tmp_path):
    (tmp_path / "mrcr").mkdir()
    for name in ("8needle", "2needle"):
        record = MRCR | {"n_needles": int(name[0])}
        pq.write_table(pa.Table.from_pylist([record]), tmp_path / "mrcr" / f"{name}.parquet")
    rows = build("mrcr", tmp_path / "mrcr", tmp_path)
    assert rows[0] == row("mrcr", "", "x9\nTapirs\nroam", "", CHAT[2]["content"]) | {
        "prompt": CHAT,
        "extra_info": {
            "split": "test",
            "index": 0,
            "n_needles": 2,
            "desired_msg_index": 1,
            "total_messages": 3,
            "n_chars": 80,
        },
    }
    assert [r["extra_info"]["n_needles"] for r in rows] == [2, 8]


def test_tatqa_joins_text_and_table_and_gives_numbers_their_scale(tmp_path):
    questions = [asked(-12.6, "arithmetic", "million", "q1"), asked(["fell"], "span", "", "q2")]
    path = tmp_path / "tatqa.json"
    path.write_text(json.dumps([REPORT | {"questions": questions}]))
    document = "Sales fell.\nIn millions.\n | 2019\nOther | 44.1"
    question = (
        "How much? Give the number with its scale (thousand, million, billion or percent), if any."
    )
    extra = {"answer_type": "arithmetic", "scale": "million"}
    message = QA_PROMPT.format(document, question)
    second = QA_PROMPT.format(document, "How much?")
    assert build("tatqa", path, tmp_path) == [
        row(
            "tatqa_docmath", message, "-12.6 million", document, question, index=0, id="q1", **extra
        ),
        row(
            "tatqa_musique", second, "fell", document, "How much?",
            index=1, id="q2", answer_type="span", scale="",
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "form", "scale", "gold", "source"),
    [
        (-22.22, "arithmetic", "percent", "-22.22%", "tatqa_docmath"),
        (73, "arithmetic", "thousand", "73 thousand", "tatqa_docmath"),
        (2.93, "arithmetic", "", "2.93", "tatqa_docmath"),
        ("4", "count", "", "4", "tatqa_docmath"),
        (["$1,496.5"], "span", "million", "1,496.5 million", "tatqa_docmath"),
        (["(114)"], "span", "million", "-114 million", "tatqa_docmath"),
        (["$(9.8) million"], "span", "", "-9.8 million", "tatqa_docmath"),
        (["−298"], "span", "million", "-298 million", "tatqa_docmath"),
        (["36%"], "span", "", "36%", "tatqa_docmath"),
        (["2019"], "span", "", "2019", "tatqa_musique"),
        (["2.5 years"], "span", "", "2.5 years", "tatqa_musique"),
        (["UK", "", "USA"], "multi-span", "", "UK; USA", "tatqa_musique"),
        (["65", "(71)"], "multi-span", "million", "65 million; -71 million", "tatqa_musique"),
    ],
)
def test_golds_of_tatqa_score_1(tmp_path, answer, form, scale, gold, source):
    path = tmp_path / "tatqa.json"
    path.write_text(json.dumps([REPORT | {"questions": [asked(answer, form, scale)]}]))
    (built,) = build("tatqa", path, tmp_path)
    assert (built["reward_model"]["ground_truth"], built["data_source"]) == (gold, source)
    response = f"Therefore, the answer is ({gold})."
    score = score_response(
        data_source=source, ground_truth=gold, response_text=response, reasoning_open=False
    )
    assert score.value == 1.0


@pytest.mark.parametrize(
    ("name", "good", "change", "message"),
    [
        ("musique", LONGBENCH, {"answers": []}, "`answers` must be a list of texts that is not"),
        ("musique", LONGBENCH, {"answers": [" "]}, "the first of `answers` is empty"),
        ("musique", LONGBENCH, {"answers": [1]}, "`answers` must be a list of texts"),
        ("musique", LONGBENCH, {"input": None}, "`input` must be a text that is not empty"),
        ("musique", LONGBENCH, {"context": " "}, "`context` must be a text that is not empty"),
        ("longbench_v2", CHOICE, {"answer": "AB"}, "must be A, B, C or D, found 'AB'"),
        ("longbench_v2", CHOICE, {"answer": "E"}, "must be A, B, C or D, found 'E'"),
        ("longbench_v2", CHOICE, {"difficulty": 1}, "`difficulty` must be a text"),
        ("frames", FRAMES, {"wiki_items": "x"}, "`wiki_items` must be a list of {title, text}"),
        ("frames", FRAMES, {"wiki_items": [{"title": "x"}]}, "`text` must be a text"),
        ("tatqa", REPORT, {"table": []}, "`table.table` must be a list of rows"),
        ("tatqa", REPORT, {"paragraphs": [{}]}, "every paragraph needs `order`"),
        ("tatqa", REPORT, {"questions": [1]}, "question 0: expected an object"),
        ("tatqa", REPORT, {"questions": [asked(1, "sum", "")]}, "answer_type 'sum' must be among"),
        ("tatqa", REPORT, {"questions": [asked([], "span", "")]}, "question 0: `answer` is empty"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, good, change, message):
    path = lines(tmp_path / "set.jsonl", good, good | change)
    with pytest.raises(DataError, match=f"set.jsonl, line 2.*{message}"):
        build(name, path, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "{"}, "row 1: not JSON"),
        ({"prompt": "[1]"}, "row 1: `prompt` must be a JSON list of {role, content}"),
        ({"prompt": "[]"}, "row 1: the last message of `prompt` must be the user's"),
        ({"answer": "Tapirs"}, "row 1: `answer` must start with `random_string_to_prepend`"),
    ],
)
def test_a_bad_row_of_mrcr_is_named(tmp_path, change, message):
    pq.write_table(pa.Table.from_pylist([MRCR, MRCR | change]), tmp_path / "2needle.parquet")
    with pytest.raises(DataError, match=f"2needle.parquet, {message}"):
        build("mrcr", tmp_path / "2needle.parquet", tmp_path)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        build("frames", tmp_path / "none.jsonl", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no file complong_testmini.jsonl or complong_testmini"):
        build("docmath_all", tmp_path / "empty", tmp_path)
    with pytest.raises(DataError, match="holds no questions of mrcr"):
        build("mrcr", tmp_path / "empty", tmp_path)
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"text.parquet cannot be read as a parquet file"):
        build("mrcr", tmp_path / "text.parquet", tmp_path)
    (tmp_path / "cut.json").write_text('[{"a": 1}')
    with pytest.raises(DataError, match=r"cut.json: not JSON .*one list of objects"):
        build("longbench_v2", tmp_path / "cut.json", tmp_path)
    path = lines(tmp_path / "set.jsonl", FRAMES)
    with pytest.raises(ConfigError, match="same file as the input"):
        build_benchmark("frames", path, path, check_gold=check_gold)


def test_command_writes_and_counts(tmp_path):
    path, out = lines(tmp_path / "set.jsonl", FRAMES), tmp_path / "frames.parquet"
    done = CliRunner().invoke(app, ["data", "benchmark", "frames", str(path), str(out)])
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"1 rows (the published set has 824): {out}; licence: Apache 2.0")
    refused = CliRunner().invoke(app, ["data", "benchmark", "squad", str(path), str(out)])
    assert refused.exit_code == 2


def test_the_command_knows_every_set():
    assert set(get_args(BenchmarkName)) == set(BENCHMARKS)
