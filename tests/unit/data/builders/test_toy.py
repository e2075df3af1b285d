"""The toy task: answers that the documents really hold, and files that do not overlap."""

import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_qlrl.data.builders import toy

KINDS = ("needle", "needles", "two_hop")


def records(kind, num_facts, count=40):
    rng = np.random.default_rng(7)
    return [toy.make_record(rng, kind, num_facts) for _ in range(count)]


def words(text):
    return re.findall(r"[A-Za-z]+", text)


def test_no_word_means_two_things():
    items = [item for group in toy.ITEMS.values() for item in group]
    names = [*items, *toy.ITEMS, *toy.ROLES, *toy.TOWNS]
    assert len(toy.ITEMS) == 16
    assert {len(group) for group in toy.ITEMS.values()} == {10}
    assert len(names) == len(set(names)) == 160 + 16 + 16 + 24


@pytest.mark.parametrize("num_facts", [2, 8, 40])
def test_needle_document_names_exactly_one_item_of_the_asked_category(num_facts):
    for record in records("needle", num_facts):
        category = record.question.split()[1]
        assert [w for w in words(record.document) if w in toy.ITEMS[category]] == [record.answer]
        others = [w for w in words(record.document) if any(w in g for g in toy.ITEMS.values())]
        assert len(others) == num_facts


def test_needles_asks_for_one_item_of_each_of_two_categories():
    for record in records("needles", 8):
        _, first, _, _, second, *_ = record.question.split()
        (x,) = [w for w in words(record.document) if w in toy.ITEMS[first]]
        (y,) = [w for w in words(record.document) if w in toy.ITEMS[second]]
        assert record.answer == f"{x} and {y}"


@pytest.mark.parametrize(("num_facts", "num_candidates"), [(4, 2), (8, 2), (40, 10)])
def test_two_hop_needs_the_town_of_the_role(num_facts, num_candidates):
    for record in records("two_hop", num_facts):
        _, category, *_, role, _ = record.question.replace("?", "").split()
        lines = record.document.split("\n")
        (home,) = [line for line in lines if line.startswith(f"The {role} lives in ")]
        town = home.removeprefix(f"The {role} lives in ").removesuffix(".")
        items = {w: line for line in lines for w in words(line) if w in toy.ITEMS[category]}
        assert len(items) == num_candidates
        assert [x for x, line in items.items() if town in words(line)] == [record.answer]


@pytest.mark.parametrize("kind", KINDS)
def test_response_ends_with_the_sentence_the_rule_reads(kind):
    for record in records(kind, 8):
        reasoning, final = record.response.split("</think>")
        assert final.strip() == f"Therefore, the answer is {record.answer}."
        assert all(word in reasoning for word in record.answer.split(" and "))


def test_message_is_the_shared_template_around_the_document():
    (record,) = records("needle", 6, count=1)
    assert f"<text>\n{record.document}\n</text>" in record.message
    assert record.question in record.message
    assert "the answer is (insert answer here)" in record.message


def test_documents_of_a_length_class_have_its_number_of_lines(tmp_path):
    paths = toy.build_toy(tmp_path, seed=0, num_train=60, num_eval=60)
    # facts plus int(0.3 * facts) fillers: 6 -> 7, 10 -> 13, 24 -> 31, 40 -> 52
    for name, low, high in [("sft", 7, 13), ("eval_short", 7, 13), ("eval_long", 31, 52)]:
        num_lines = [len(d.split("\n")) for d in column(paths[name], "document")]
        assert low <= min(num_lines) <= max(num_lines) <= high
    lengths = [info["length"] for info in column(paths["train"], "extra_info")]
    assert lengths == ["short", "long"] * 30


@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_verls_columns_and_agree_with_themselves(tmp_path, kind):
    paths = toy.build_toy(tmp_path, seed=3, num_train=4, num_eval=2, kind=kind)
    base = [
        "data_source",
        "prompt",
        "ability",
        "reward_model",
        "extra_info",
        "document",
        "question",
    ]
    assert set(paths) == {"sft", "train", "eval_short", "eval_long"}
    for name, path in paths.items():
        table = pq.read_table(path)
        assert table.column_names == base + (["response"] if name == "sft" else [])
        for index, row in enumerate(table.to_pylist()):
            assert row["data_source"] == f"toy_docqa_{kind}"
            assert row["reward_model"]["style"] == "rule"
            assert [message["role"] for message in row["prompt"]] == ["user"]
            assert row["document"] in row["prompt"][0]["content"]
            assert row["question"] in row["prompt"][0]["content"]
            assert row["extra_info"]["split"] == name
            assert row["extra_info"]["index"] == index
            if name == "sft":
                assert row["response"].endswith(f"is {row['reward_model']['ground_truth']}.")


def test_no_document_occurs_twice(tmp_path):
    paths = toy.build_toy(tmp_path, seed=1, num_train=300, num_eval=200)
    documents = [d for path in paths.values() for d in column(path, "document")]
    assert len(documents) == len(set(documents)) == 300 + 300 + 200 + 200


def test_a_document_that_was_seen_is_drawn_again():
    first = toy.make_record(np.random.default_rng(5), "needle", 2)
    rng = ConstantThenFresh(first, toy.make_record(np.random.default_rng(6), "needle", 2))
    seen = {first.document}
    again = toy.first_unseen(rng, seen)
    assert again is rng.second
    assert seen == {first.document, rng.second.document}


class ConstantThenFresh:
    """A source of records that gives the first one three times, then the second."""

    def __init__(self, first, second):
        self.first, self.second, self.calls = first, second, 0

    def __call__(self):
        self.calls += 1
        return self.first if self.calls <= 3 else self.second


def test_same_seed_same_rows_and_other_seed_other_rows(tmp_path):
    tables = []
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        paths = toy.build_toy(tmp_path / name, seed=seed, num_train=10, num_eval=2)
        tables.append(column(paths["train"], "document"))
    assert tables[0] == tables[1]
    assert not set(tables[0]) & set(tables[2])


def test_corpus_holds_every_kind_of_question():
    texts = toy.toy_corpus(0, 9)
    assert len(texts) == 9
    assert sum("where the" in text for text in texts) == 3
    assert all("<think>" in text and "</think>" in text for text in texts)


def test_builder_needs_no_torch():
    code = "import sys, megatron_qlrl.data.builders.toy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def column(path, name):
    return pq.read_table(path).column(name).to_pylist()
