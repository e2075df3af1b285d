"""The hand-written corpus: right answers are rewarded, hostile ones never, and none runs code.

`corpus/*.yaml` hold questions with their responses; `paraphrase.yaml` states what the rule gives
and leaves to the judge. Giant and deeply nested responses are made here.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from megatron_qlrl.reward.rules import RuleName, rule_of
from megatron_qlrl.reward.score import score_response

CORPUS = Path(__file__).parent / "corpus"
KINDS = ("golden", "paraphrase", "hostile", "graded")
GOLDS = {
    "musique": "Yes",
    "docmath": "5",
    "long_toc_choices": "A",
    "toy_docqa": "cocoa",
    "mrcr": "x9\nTapirs roam",
}
FORBIDDEN_EVENTS = ("os.", "subprocess.", "socket.", "pty.", "shutil.", "ctypes.")

AUDITED = """
import json, sys
from megatron_qlrl.reward.score import score_response

cases = json.load(sys.stdin)
seen = []
eight = "</think>\\\\boxed{2^{3}}"  # starts the child that reads expressions
rest = {"response_text": eight, "reasoning_open": True}
assert score_response(data_source="docmath", ground_truth="8", **rest).rule == 1.0
sys.addaudithook(
    lambda event, args: seen.append(event)
    if event in ("exec", "compile", "import", "open") or event.startswith(FORBIDDEN_EVENTS)
    else None
)
rules = [score_response(**case).rule for case in cases]
events = list(seen)
eval("1")
print(json.dumps({"rules": rules, "events": events, "hooked": len(seen) > len(events)}))
""".replace("FORBIDDEN_EVENTS", repr(FORBIDDEN_EVENTS))


def read_cases(kind: str) -> list[dict]:
    groups = yaml.safe_load((CORPUS / f"{kind}.yaml").read_text(encoding="utf-8"))
    return [{**group, **case} for group in groups for case in group["cases"]]


def fields(case: dict) -> dict[str, str | bool]:
    return {
        "data_source": case["data_source"],
        "ground_truth": case["ground_truth"],
        "response_text": case["response"],
        "reasoning_open": True,
    }


CASES = [(kind, case) for kind in KINDS for case in read_cases(kind)]

# "(5)" would be right for docmath; two hundred thousand brackets around it are not.
_PAIRS = ("()", "[]", ("\\text{", "}"), ("$", "$"), ("\\frac{", "}"), ("{", "}"), ("\\(", "\\)"))
NESTED = [opening * 200_000 + "5" + closing * 200_000 for opening, closing in _PAIRS]
_FILLERS = [
    "a",
    "9",
    " ",
    "\n",
    "-",
    "%",
    "A. ",
    "Yes ",
    "the answer is ",
    "the ",
    "\u0301a",
    "\\boxed{",
]
_FILLERS += [
    "1,",
    "1/",
    "= ",
    "(7) ",
    "\u200b",
    "not ",
    "a\u0323\u0301",
    "<think>",
    "\\boxed{7} ",
    "**",
]
GIANT = [filler * (1_000_000 // len(filler)) for filler in _FILLERS]


def test_the_corpus_is_large_and_each_kind_keeps_its_promise():
    assert len(CASES) >= 300
    expected = {kind: {c["expected"] for k, c in CASES if k == kind} for kind, _ in CASES}
    assert expected == {
        "golden": {1},
        "paraphrase": {0, 1},
        "hostile": {0},
        "graded": {0, 1},
    }
    assert all(set(case) == {"data_source", "question", "ground_truth", "cases", "response",
                             "expected", "why"} for _, case in CASES)  # fmt: skip
    assert len({tuple(fields(case).values()) for _, case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("kind", "case"), CASES, ids=[f"{k}-{i}" for i, (k, _) in enumerate(CASES)]
)
def test_the_rule_gives_what_the_corpus_says(kind, case):
    score = score_response(**fields(case))
    assert score.rule == case["expected"], (kind, case["ground_truth"], case["response"])
    assert bool(score.matched) == bool(score.prediction)


def test_every_rule_has_a_gold_here():
    own = {"custom"}  # what the user's functions accept is theirs to say
    assert {rule_of(source).rule for source in GOLDS} == set(get_args(RuleName)) - own


@pytest.mark.parametrize("source", GOLDS)
@pytest.mark.parametrize("text", NESTED + GIANT, ids=lambda text: repr(text[:9]))
def test_giant_and_nested_answers_earn_nothing(source, text):
    for response in (
        f"</think>{text}",
        f"</think>the answer is {text}",
        f"</think>\\boxed{{{text}}}",
    ):
        score = score_response(
            data_source=source,
            ground_truth=GOLDS[source],
            response_text=response,
            reasoning_open=True,
        )
        assert score.rule == 0.0
        assert len(score.prediction) <= 400


def test_scoring_hostile_answers_runs_no_code():
    cases = [fields(case) for kind, case in CASES if kind == "hostile"]
    done = subprocess.run(
        [sys.executable, "-c", AUDITED],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["hooked"]
    assert result["rules"] == [0.0] * len(cases)
    assert result["events"] == []
