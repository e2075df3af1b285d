"""Which prompts a check answers, and what it shows of them."""

import numpy as np

from megatron_qlrl.evaluate.sample import report, spread
from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup


def prompt(uid: str, source: str, tokens: int) -> Prompt:
    return Prompt(uid, np.arange(tokens, dtype=np.int32), source, "?", "misc")


class Tokenizer:
    def decode(self, ids: np.ndarray) -> str:
        return f"<|user|>{len(ids)}\n"


def test_prompts_are_spread_over_sources_and_lengths() -> None:
    prompts = [prompt(f"m:{n}", "musique", n) for n in (9, 1, 5, 7)]
    prompts += [prompt(f"d:{n}", "docmath", n) for n in (4, 2)]
    assert [p.uid for p in spread(prompts, 3)] == ["d:2", "m:1", "m:7"]
    assert [p.uid for p in spread(prompts, 9)] == ["d:2", "d:4", "m:1", "m:5", "m:7", "m:9"]


def test_a_report_shows_prompt_response_reading_and_counts() -> None:
    def group(uid: str, text: str, finished: bool, score: Score) -> ScoredGroup:
        rollout = Rollout(uid, 0, np.zeros(3, np.int32), np.zeros(3, np.float32), text, finished, 0)
        return ScoredGroup(prompt(uid, "musique", 5), (rollout,), (score,))

    right = Score(1.0, 1.0, matched="the answer is", prediction="misc")
    masked = Score(None, 0.0, matched="boxed", prediction="other")
    text = report(
        [
            group("a:0", "the answer is misc", True, right),
            group("a:1", "I do not know\x1b", False, Score(0.0, 0.0)),
            group("a:2", "\\boxed{other}", True, masked),
        ],
        Tokenizer(),
    )
    lines = text.splitlines()
    assert lines[0] == "[1/3] a:0, musique, 5 tokens; reasoning is optional"
    assert lines[1] == "  prompt:   '<|user|>5\\n'"
    assert lines[2] == "  response: 'the answer is misc' (3 tokens)"
    assert lines[3] == "  read:     'misc' (from 'the answer is')"
    assert lines[5] == "  score:    1"
    cut = "  response: 'I do not know\\x1b' (3 tokens, cut at rollout.max_response_tokens)"
    assert cut in lines
    assert "  read:     no answer" in lines
    assert "  score:    no verdict" in lines
    assert lines[-1].split() == ["musique", "3", "2", "1", "1"]
