"""What a judge was measured to be worth on labelled pairs, and what a run demands of that.

In: the file that `qlrl judge certify` wrote, and the judge of a run. Out: the certificate, or an
error. A certificate holds for one model name, one prompt and one set of pairs.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_qlrl.config.schema import JudgeConfig
from megatron_qlrl.errors import RewardError
from megatron_qlrl.reward.pairs import Label, pairs_digest
from megatron_qlrl.reward.verdict import prompt_digest

FILE = "judge_certificate.json"
"""The name of a certificate unless the user gives one, and of the copy in a run's folder."""
_Z = 1.959964  # of a two-sided interval of 95 %


@dataclass(frozen=True)
class Rate:
    """A share of pairs with its 95 % interval (Wilson 1927), all in [0, 1]; `value` is None where
    there is no pair."""

    wrong: int
    of: int

    @property
    def value(self) -> float | None:
        return self.wrong / self.of if self.of else None

    @property
    def interval(self) -> tuple[float, float]:
        n, z2 = self.of, _Z**2
        if not n:
            return 0.0, 1.0
        p = self.wrong / n
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z / (1 + z2 / n) * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
        # At both ends the formula gives exactly 0 and 1, but for rounding.
        low = 0.0 if self.wrong == 0 else middle - half
        return low, 1.0 if self.wrong == n else middle + half

    def __str__(self) -> str:
        if self.value is None:
            return "not known (0 pairs)"
        low, high = self.interval
        return (
            f"{self.value:.1%} ({self.wrong} of {self.of} pairs, 95% interval {low:.1%} to "
            f"{high:.1%})"
        )


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Outcomes(_Closed):
    """Numbers of pairs of one label, each counted once.

    Attributes:
        wrong: some repetition brought a verdict against the label.
        no_verdict: not wrong, and some repetition brought no verdict.
        right: every repetition brought the verdict of the label.
        unasked: training gives such an answer 0 without asking the judge.
    """

    right: int = Field(default=0, ge=0)
    wrong: int = Field(default=0, ge=0)
    no_verdict: int = Field(default=0, ge=0)
    unasked: int = Field(default=0, ge=0)

    def __add__(self, other: "Outcomes") -> "Outcomes":
        mine, others = self.model_dump(), other.model_dump()
        return Outcomes(**{name: mine[name] + others[name] for name in mine})

    @property
    def rate(self) -> Rate:
        """Returns the share of wrong pairs among those with verdicts."""
        return Rate(self.wrong, self.wrong + self.right)


class Category(_Closed):
    """The outcomes of one kind of pairs, by label."""

    equivalent: Outcomes = Outcomes()
    different: Outcomes = Outcomes()

    def of(self, label: Label) -> Outcomes:
        return self.equivalent if label == "equivalent" else self.different


class Certificate(_Closed):
    """What `qlrl judge certify` measured.

    Attributes:
        model: name under which the servers offer the judge.
        urls: its servers.
        prompt, pairs: digests of the judge's prompt and of the labelled set.
        made: date and time (ISO 8601, UTC).
        repeats: how often each pair was asked about.
        categories: outcomes by category and label.
        agreeing, repeated: pairs whose verdicts are all the same, among those with several.
        verdicts_per_s: verdicts by the seconds that they took, or None if all came from a journal.
        mistakes: numbers, from 1, of the pairs that were wrong.
    """

    format: Literal[1] = 1
    model: str
    urls: tuple[str, ...]
    prompt: str
    pairs: str
    made: str = Field(pattern=r"^\d{4}-\d\d-\d\dT[\d:+]+$")
    software: str
    repeats: int = Field(gt=0)
    categories: Mapping[str, Category]
    agreeing: int = Field(ge=0)
    repeated: int = Field(ge=0)
    verdicts_per_s: float | None
    mistakes: tuple[int, ...]

    def total(self, label: Label) -> Outcomes:
        return sum((own.of(label) for own in self.categories.values()), Outcomes())

    @property
    def false_positives(self) -> Rate:
        """Returns the share of different answers that the judge called equivalent."""
        return self.total("different").rate

    @property
    def false_negatives(self) -> Rate:
        """Returns the share of equivalent answers that the judge called different."""
        return self.total("equivalent").rate

    @property
    def no_verdict(self) -> Rate:
        """Returns the share of pairs without a verdict among those that were asked about."""
        both = self.total("equivalent") + self.total("different")
        return Rate(both.no_verdict, both.right + both.wrong + both.no_verdict)

    @property
    def unstable(self) -> Rate:
        """Returns the share of pairs whose verdicts differ from one repetition to another."""
        return Rate(self.repeated - self.agreeing, self.repeated)

    def summary(self) -> str:
        """Returns the certificate in one line, without the names of model and servers."""
        return (
            f"false positives {self.false_positives}, false negatives {self.false_negatives}, "
            f"no verdict on {self.no_verdict.wrong} of {self.no_verdict.of} pairs; measured "
            f"{self.made[:10]}, {self.repeats} verdicts a pair"
        )


def read_certificate(file: Path) -> Certificate:
    """
    Raises:
        RewardError: the file cannot be read or is no certificate.
    """
    try:
        return Certificate.model_validate_json(file.read_bytes())
    except OSError as error:
        raise RewardError(f"{file} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "file"
        raise RewardError(f"{file} is no certificate ({field}: {problem['msg']})") from None


def check_certificate(judge: JudgeConfig, *, max_no_verdict: float) -> None:
    """Checks that a judge is as good as its config demands, before expensive work starts. A judge
    of which neither `certificate` nor `max_false_positive` is set needs no certificate.

    Args:
        max_no_verdict: the largest share of pairs that may have no verdict.

    Raises:
        RewardError: there is no certificate, it is of another model, prompt or set of pairs, or
            what it says is not good enough.
    """
    if judge.certificate is None and judge.max_false_positive is None:
        return
    problem = _problem(judge, max_no_verdict)
    if problem:
        raise RewardError(
            f"the judge {judge.model} is not certified for this run: {problem}. Measure it with "
            f"`{_command(judge)}` and name the file in reward.judge.certificate, take another "
            "judge, or change reward.judge.max_false_positive"
        )


def _problem(judge: JudgeConfig, max_no_verdict: float) -> str:
    bound = judge.max_false_positive
    if judge.certificate is None:
        return f"reward.judge.max_false_positive={bound:g} and reward.judge.certificate is not set"
    try:
        certificate = read_certificate(Path(judge.certificate))
    except RewardError as error:
        return str(error)
    if certificate.model != judge.model:
        return f"{judge.certificate} is of the model {certificate.model}"
    if certificate.prompt != prompt_digest():
        return f"{judge.certificate} is of another version of the judge's prompt"
    if certificate.pairs != pairs_digest():
        return f"{judge.certificate} is of another version of the labelled pairs"
    missing, wrong = certificate.no_verdict, certificate.false_positives
    if missing.value is None or missing.value > max_no_verdict:
        return (
            f"it gave no verdict on {missing.wrong} of {missing.of} pairs, more than "
            f"reward.max_masked_share={max_no_verdict:g}"
        )
    if bound is not None and (wrong.value is None or wrong.value > bound):
        return f"its false positives are {wrong}, more than {bound:.1%}"
    return ""


def _command(judge: JudgeConfig) -> str:
    words = ["qlrl", "judge", "certify"]
    for url in judge.urls:
        words += ["--url", url]
    words += ["--model", judge.model]
    if judge.api_key_env:
        words += ["--key-env", judge.api_key_env]
    return shlex.join([*words, "--out", judge.certificate or FILE])


def certificate_table(certificate: Certificate) -> str:
    """Returns the outcomes by category, then what they come to."""
    head = f"{'category':<18}{'equivalent':>11}{'wrong':>7}{'different':>11}{'wrong':>7}"
    lines = [head + f"{'no verdict':>12}{'unasked':>9}"]
    total = Category(
        equivalent=certificate.total("equivalent"), different=certificate.total("different")
    )
    for name, own in {**certificate.categories, "all": total}.items():
        both = own.equivalent + own.different
        cells = "".join(
            f"{o.right + o.wrong + o.no_verdict:>11}{o.wrong:>7}"
            for o in (own.equivalent, own.different)
        )
        lines.append(f"{name:<18}{cells}{both.no_verdict:>12}{both.unasked:>9}")
    rate = certificate.verdicts_per_s
    facts = {
        "false positives": str(certificate.false_positives),
        "false negatives": str(certificate.false_negatives),
        "no verdict": str(certificate.no_verdict),
        "unstable": f"{certificate.unstable}, of {certificate.repeats} repetitions",
        "verdicts a second": "not known (all from the journal)" if rate is None else f"{rate:.1f}",
    }
    return "\n".join([*lines, "", *(f"{name:<20}{value}" for name, value in facts.items())])
