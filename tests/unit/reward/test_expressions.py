import os
import signal
from pathlib import Path

import pytest

from megatron_qlrl.errors import RewardError
from megatron_qlrl.reward import expressions
from megatron_qlrl.reward.expressions import ExpressionReader, evaluate

ECHO_OR_END = """
import sys
print("ready", flush=True)
for line in sys.stdin:
    if "2" in line:
        sys.exit(1)
    print(float(line), flush=True)
"""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\\frac{3}{4}", 0.75),
        ("-\\dfrac{1}{8}", -0.125),
        ("2\\frac{1}{2}", 2.5),
        ("3 \\times 10^6", 3e6),
        ("3.2 x 10^{-2}", 0.032),
        ("1.5 × 10^10", 1.5e10),
        ("x = \\sqrt{16}", 4.0),
        ("2^{10}", 1024.0),
    ],
)
def test_value_of_an_expression(text, value):
    assert evaluate(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "text", ["\\frac{1}{0}", "\\frac{1}", "9^{999}", "10^", "^{2}", "\\sqrt{-1}"]
)
def test_what_has_no_finite_real_value(text):
    assert evaluate(text) is None


@pytest.mark.parametrize(
    "text",
    ["", "5", "Paris", "5 - 6", "3 \\times 4 - 5", "9^{9^{9}}", "9^{9999}", "2**10", "x^2"]
    + ["\\input{/etc/passwd}", "\\frac{a}{b}", "__import__('os')^2", "9^9\n9", "\\int 1", "!^2"]
    + ["(" * 5 + "2^2" + ")" * 5, "\\frac{" * 30, "1^1" * 100, "1234567890123456^2", "(2^{9})^{9}"]
    + ["\\frac{1}{2}, \\frac{1}{3}", "\\frac{1}{2} or 2", "\\sqrt{\\sqrt{2}}"],
)
def test_other_text_never_reaches_the_child(text, monkeypatch):
    monkeypatch.setattr(expressions, "_reader", lambda _pid: pytest.fail("the child was asked"))
    assert evaluate(text) is None


def test_a_child_that_ends_is_cleared_away_and_started_again(tmp_path: Path):
    child = tmp_path / "child.py"
    child.write_text(ECHO_OR_END)
    reader = ExpressionReader(child)
    assert reader.read("7") == 7.0
    process = reader._process
    assert process and reader.read("2") is None
    assert process.returncode == 1  # waited for: no zombie
    assert reader.read("7") == 7.0
    assert reader._process is not process


def test_a_child_that_was_killed_between_two_expressions(tmp_path: Path):
    child = tmp_path / "child.py"
    child.write_text(ECHO_OR_END)
    reader = ExpressionReader(child)
    reader.read("7")
    assert reader._process
    os.kill(reader._process.pid, signal.SIGKILL)
    reader._process.wait()
    assert reader.read("7") == 7.0


def test_no_child_is_left_when_its_reader_is_gone(tmp_path: Path):
    child = tmp_path / "child.py"
    child.write_text(ECHO_OR_END)
    reader = ExpressionReader(child)
    reader.read("7")
    process = reader._process
    assert process and process.poll() is None
    del reader
    assert process.returncode is not None


def test_a_child_that_cannot_start_is_an_error(tmp_path: Path):
    child = tmp_path / "child.py"
    child.write_text("import nothing_of_this_name")
    with pytest.raises(RewardError, match="math-verify did not start"):
        ExpressionReader(child).read("7")


def test_an_expression_that_hangs_ends_with_its_child_only():
    reader = ExpressionReader(time_limit_s=2)
    assert reader.read("2^{3}") == 8.0
    process = reader._process
    assert process and reader.read("9^{9^{9^{9}}}") is None
    assert process.returncode == -signal.SIGALRM
    assert reader.read("2^{3}") == 8.0
