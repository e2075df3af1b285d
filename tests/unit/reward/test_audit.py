"""Files scored offline: order, counts, and rows that cannot be read."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from judge_server import MODEL, FakeJudge, Reply, running, same_initial

from megatron_qlrl.config.schema import JudgeConfig
from megatron_qlrl.errors import ConfigError, DataError
from megatron_qlrl.reward import audit as audit_module
from megatron_qlrl.reward.audit import audit
from megatron_qlrl.reward.judge import Judge
from megatron_qlrl.reward.score import Scorer


def row(answer, *, source="musique", gold="Paris", **more):
    response = f"</think>the answer is {answer}"
    fields = {"data_source": source, "question": "Which city?", "ground_truth": gold}
    return fields | {"response": response} | more


def write_jsonl(path, rows):
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def run(file, scorer=None, reasoning_open=None):
    written = []
    found = audit(file, scorer or Scorer(None), written.append, reasoning_open=reasoning_open)
    return found, written


def test_a_row_without_tags_scores_as_its_prompt_was(tmp_path):
    plain = row("Paris", response="Therefore, the answer is Paris.")
    file = write_jsonl(
        tmp_path / "a.jsonl", [plain, row("Paris"), plain | {"reasoning": "optional"}]
    )
    assert [r["score"] for r in run(file, reasoning_open=True)[1]] == [0.0, 1.0, 1.0]
    assert [r["score"] for r in run(file, reasoning_open=False)[1]] == [1.0, 1.0, 1.0]
    with pytest.raises(ConfigError, match=r"a.jsonl:1: .* --model .* --reasoning optional"):
        run(file)


def test_what_a_row_says_of_its_reasoning_wins(tmp_path):
    plain = row("Paris", response="Therefore, the answer is Paris.")
    said = [plain | {"reasoning": word} for word in ("optional", "required", "often")]
    jsonl = write_jsonl(tmp_path / "a.jsonl", said)
    parquet = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(said), parquet)
    for file in (jsonl, parquet):
        found, written = run(file, reasoning_open=True)
        assert [r["score"] for r in written] == [1.0, 0.0]
        assert found.bad == [f"{file}:3: field 'reasoning' is 'often', expected 'required' or "
                             "'optional'"]  # fmt: skip


def test_rows_keep_their_order_and_fields(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_module, "_MAX_WAITING", 3)
    answers = [("Paris", 1.0), ("Rome", 0.0), ("Paris", 1.0), ("Oslo", 0.0), ("Paris", 1.0)]
    file = write_jsonl(tmp_path / "a.jsonl", [row(a, id=n) for n, (a, _) in enumerate(answers)])
    found, written = run(file)
    assert [r["id"] for r in written] == [0, 1, 2, 3, 4]
    assert [r["score"] for r in written] == [s for _, s in answers]
    assert written[1] == row("Rome", id=1) | {
        "rule": 0.0,
        "judge": None,
        "score": 0.0,
        "matched": "the answer is",
        "masked": False,
    }
    assert found.bad == []


def test_bad_rows_are_named_and_the_others_scored(tmp_path):
    good = row("Paris")
    without_question = {k: v for k, v in good.items() if k != "question"}
    file = write_jsonl(
        tmp_path / "a.jsonl",
        [
            good,
            b'{"data_source": ',
            b"[1, 2]",
            without_question,
            good | {"ground_truth": 7},
            good | {"data_source": "gsm8k"},
            b"\xff\xfe{}",
            b"[" * 100_000,
            b"",
            good | {"response": None},
            good | {"data_source": "musique \ud800"},
            good,
        ],
    )
    found, written = run(file)
    assert len(written) == 2
    reasons = {
        2: "not readable as JSON",
        3: "a list, expected a JSON object",
        4: "field 'question' is missing",
        5: "field 'ground_truth' is a int, expected text",
        6: "data_source 'gsm8k' has no rule",
        7: "not readable as JSON",
        8: "not readable as JSON",
        10: "field 'response' is a NoneType, expected text",
        11: "field 'data_source' is no Unicode text",
    }
    assert len(found.bad) == len(reasons)
    for line, (number, reason) in zip(found.bad, reasons.items(), strict=True):
        assert line.startswith(f"{file}:{number}: {reason}")


def test_parquet_is_read_alike(tmp_path):
    rows = [row("Paris"), row("Rome"), row("Rome") | {"question": None}]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([r | {"other": 1} for r in rows]), file)
    found, written = run(file)
    assert [r["score"] for r in written] == [1.0, 0.0]
    assert found.bad == [
        f"{tmp_path / 'a.parquet'}:3: field 'question' is a NoneType, expected text"
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "does not exist"),
        ("a.txt", b"{}", r"expected a \.jsonl or \.parquet file"),
        ("a.parquet", b"PAR1 cut", "not a readable parquet file"),
        ("a.jsonl", b"", "a.jsonl holds no row that can be scored"),
    ],
)
def test_a_file_that_cannot_be_read_at_all(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        run(tmp_path / name)


def test_counts_of_rule_and_judge_by_source(tmp_path):
    def answer(fields):
        broken = fields["candidate"] == "Pavia"
        return Reply("cut", finish_reason="length") if broken else same_initial(fields)

    file = write_jsonl(
        tmp_path / "a.jsonl",
        [row(a) for a in ("Paris", "Paname", "Pavia", "Rome")]
        + [row("5", source="docmath", gold="5"), row("(B)", source="long_toc_choices", gold="A")],
    )
    with running(FakeJudge(answer)) as server:
        config = JudgeConfig.model_validate({"urls": [server.url], "model": MODEL})
        scorer = Scorer(Judge(config, key=None))
        found, written = run(file, scorer)
        scorer.close()
    assert [(r["rule"], r["judge"], r["score"], r["masked"]) for r in written] == [
        (1.0, None, 1.0, False),
        (0.0, 1.0, 1.0, False),
        (0.0, None, None, True),
        (0.0, 0.0, 0.0, False),
        (1.0, None, 1.0, False),
        (0.0, None, 0.0, False),
    ]
    table = [line.split() for line in found.table().splitlines()]
    assert table == [
        ["source", "rows", "rule", "asked", "judge", "masked", "both"],
        ["docmath", "1", "1", "0", "0", "0", "100.0%"],
        ["long_toc_choices", "1", "0", "0", "0", "0", "0.0%"],
        ["musique", "4", "1", "3", "1", "1", "66.7%"],
        ["all", "6", "2", "3", "1", "1", "60.0%"],
    ]


def test_a_source_that_is_masked_as_a_whole_has_no_share(tmp_path):
    with running(FakeJudge(lambda _: Reply("?"))) as server:
        config = JudgeConfig.model_validate({"urls": [server.url], "model": MODEL})
        scorer = Scorer(Judge(config, key=None))
        found, _ = run(write_jsonl(tmp_path / "a.jsonl", [row("Rome")]), scorer)
        scorer.close()
    assert found.table().splitlines()[-1].split() == ["all", "1", "0", "1", "0", "1", "-"]


def test_a_text_in_parquet_that_is_no_utf8(tmp_path):
    columns = {name: ["x"] for name in ("data_source", "question", "ground_truth")}
    bad = pa.array([b"\xff\xfe"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table(columns | {"response": bad}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet is not a readable parquet file: .*UTF8"):
        run(tmp_path / "a.parquet")
