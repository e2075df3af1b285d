"""Measures a judge on the labelled pairs, with the client, the prompt and the parser of training.

pair -> claim, or 0 unasked -> journal -> judge, `repeats` times -> outcomes -> certificate
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path

from pydantic import TypeAdapter

from megatron_qlrl import __version__
from megatron_qlrl.config.schema import JudgeConfig
from megatron_qlrl.errors import RewardError
from megatron_qlrl.platform.journal import open_journal
from megatron_qlrl.platform.progress import Tally
from megatron_qlrl.reward.certificate import Category, Certificate, Outcomes, Rate
from megatron_qlrl.reward.extract import Answer
from megatron_qlrl.reward.judge import Judge
from megatron_qlrl.reward.pairs import Label, Pair, pairs_digest, read_pairs
from megatron_qlrl.reward.rules import apply_rule
from megatron_qlrl.reward.verdict import Claim, make_claim, prompt_digest

Verdict = bool | None


@dataclass(frozen=True)
class _Line:
    digest: str
    repeat: int
    verdict: bool


_LINE = TypeAdapter(_Line)


class VerdictJournal:
    """Verdicts on disk as they come, so that a command that was killed goes on."""

    def __init__(self, path: Path, judge: JudgeConfig) -> None:
        """Lines about another judge or another prompt are passed over.

        Raises:
            DataError: the journal cannot be read or written.
        """
        self._known: dict[tuple[str, int], bool] = {}
        self._judge = [prompt_digest(), judge.model, *judge.urls]
        self._file, lines = open_journal(path, _LINE)
        for line in lines:
            self._known[line.digest, line.repeat] = line.verdict

    def known(self, claim: Claim, repeat: int) -> Verdict:
        return self._known.get((self._digest(claim), repeat))

    def add(self, claim: Claim, repeat: int, verdict: bool) -> None:
        """Records a verdict; it survives whatever comes next."""
        digest = self._digest(claim)
        self._file.add(json.dumps({"digest": digest, "repeat": repeat, "verdict": verdict}))
        self._known[digest, repeat] = verdict

    def close(self) -> None:
        self._file.close()

    def _digest(self, claim: Claim) -> str:
        parts = json.dumps([*self._judge, claim.question, claim.gold, claim.prediction])
        return blake2b(parts.encode(), digest_size=16).hexdigest()


def certify(
    judge: JudgeConfig,
    *,
    key: str | None,
    repeats: int,
    journal: VerdictJournal,
    tally: Tally | None = None,
    pairs: Sequence[Pair] | None = None,
    pause_s: float = 0.5,
) -> Certificate:
    """Asks a judge `repeats` times about every pair. Each repetition has a client of its own,
    because a client asks no question twice.

    Args:
        pairs: None for all labelled pairs.
        tally: counts the verdicts as they come.
        pause_s: as in `Judge`.

    Raises:
        RewardError: there is no verdict on any pair.
        DataError: the journal cannot be written.
    """
    pairs = read_pairs() if pairs is None else pairs
    claims = [make_claim(question=p.question, gold=p.gold, prediction=p.answer) for p in pairs]
    asked = [claim for claim in claims if claim is not None]
    tally = tally or Tally("verdicts")
    tally.total = repeats * len(asked)
    rounds: list[list[Verdict]] = []
    replies, seconds, failure = 0.0, 0.0, ""
    for repeat in range(repeats):
        client = Judge(judge, key=key, pause_s=pause_s)
        start = time.perf_counter()
        rounds.append(asyncio.run(_ask_all(client, asked, repeat, journal, tally)))
        seconds += time.perf_counter() - start
        replies += client.counts["replies"]
        failure = client.last_failure or failure
    by_claim = iter(zip(*rounds, strict=True))
    verdicts = [None if claim is None else next(by_claim) for claim in claims]
    if not any(v is not None for own in verdicts for v in own or ()):
        raise RewardError(f"the judge gave no verdict on any of {len(asked)} pairs ({failure})")
    several = [own for own in verdicts if own and len(own) - own.count(None) > 1]
    return Certificate(
        model=judge.model,
        urls=judge.urls,
        prompt=prompt_digest(),
        pairs=pairs_digest(),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        software=f"megatron_qlrl {__version__}",
        repeats=repeats,
        categories=_by_category(pairs, verdicts),
        agreeing=sum(len(set(own) - {None}) == 1 for own in several),
        repeated=len(several),
        verdicts_per_s=replies / seconds if replies else None,
        mistakes=tuple(
            number
            for number, (pair, own) in enumerate(zip(pairs, verdicts, strict=True), 1)
            if own is not None and _wrong(pair) in own
        ),
    )


async def _ask_all(
    client: Judge, claims: Sequence[Claim], repeat: int, journal: VerdictJournal, tally: Tally
) -> list[Verdict]:
    async def one(claim: Claim) -> Verdict:
        known = journal.known(claim, repeat)
        if known is not None:
            tally.known += 1
            return known
        verdict = await client.verdict(claim)
        tally.done += 1
        if verdict is not None:
            journal.add(claim, repeat, verdict)
        return verdict

    try:
        return await asyncio.gather(*map(one, claims))
    finally:
        await client.close()


def _wrong(pair: Pair) -> bool:
    """Returns the verdict that contradicts the label."""
    return pair.label == "different"


def _by_category(
    pairs: Sequence[Pair], verdicts: Sequence[Sequence[Verdict] | None]
) -> dict[str, Category]:
    counts = Counter(
        (pair.category, pair.label, _outcome(pair, own))
        for pair, own in zip(pairs, verdicts, strict=True)
    )

    def outcomes(name: str, label: Label) -> Outcomes:
        return Outcomes(**{kind: counts[name, label, kind] for kind in Outcomes.model_fields})

    return {
        name: Category(
            equivalent=outcomes(name, "equivalent"), different=outcomes(name, "different")
        )
        for name in dict.fromkeys(pair.category for pair in pairs)
    }


def _outcome(pair: Pair, verdicts: Sequence[Verdict] | None) -> str:
    if verdicts is None:
        return "unasked"
    if _wrong(pair) in verdicts:
        return "wrong"
    return "no_verdict" if None in verdicts else "right"


def rule_alone() -> tuple[Rate, Rate]:
    """Returns the false positives and the false negatives of the rule `qa` on all pairs."""
    given = [(p, apply_rule("qa", gold=p.gold, answer=Answer(p.answer, ""))) for p in read_pairs()]
    different = [yes for pair, yes in given if pair.label == "different"]
    equivalent = [yes for pair, yes in given if pair.label == "equivalent"]
    return (
        Rate(sum(different), len(different)),
        Rate(len(equivalent) - sum(equivalent), len(equivalent)),
    )
