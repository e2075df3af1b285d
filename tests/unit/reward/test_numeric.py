import pytest

from megatron_qlrl.reward.numeric import Number, parse_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1234", 1234.0),
        ("1,234", 1234.0),
        ("1,234,567.5", 1234567.5),
        ("1{,}234", 1234.0),
        ("1,\\!234", 1234.0),
        ("-32.4", -32.4),
        ("−32.4", -32.4),
        ("+5", 5.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("0", 0.0),
        ("$1,234.50", 1234.5),
        ("\\$5", 5.0),
        ("-$5", -5.0),
        ("$-5", -5.0),
        ("US$ 5", 5.0),
        ("€5", 5.0),
        ("1.5 million", 1.5e6),
        ("$1.5 billion", 1.5e9),
        ("2 thousand", 2000.0),
        ("$1.5 \\text{ million}$", 1.5e6),
        ("3 million dollars", 3e6),
        ("12 shares", 12.0),
        ("approximately 7.5", 7.5),
        ("x = 5", 5.0),
        ("10/2 = 5.0", 5.0),
        ("x \\approx 5.2", 5.2),
        ("1.5e3", 1500.0),
        ("3/4", 0.75),
        ("-1/4", -0.25),
        ("1,000/8", 125.0),
        ("minus 5", -5.0),
        ("negative $5 million", -5e6),
        ("10\\,000", 10000.0),
        ("10/2 = 20/4 = 5", 5.0),
        ("-0", 0.0),
    ],
)
def test_plain_numbers(text, value):
    assert parse_number(text) == Number(pytest.approx(value, rel=1e-15))


@pytest.mark.parametrize(
    "text", ["5.3%", "5.3 %", "5.3\\%", "$5.3\\%$", "5.3 percent", "5.3 per cent"]
)
def test_percentages(text):
    assert parse_number(text) == Number(5.3, percent=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abc",
        "5 or 6",
        "a = 5, b = 6",
        "x = 5 or x = 6",
        "5; x = 6",
        "5, 6",
        "1,23",
        "12,34",
        "1,2345",
        "5 6",
        "--5",
        "-$-5",
        "5m",
        "5 m",
    ]
    + [
        "5 hundred",
        "5 million thousand",
        "5 million decrease",
        "5 loss",
        "((5))",
        "(5)",
        "50 basis points",
        "50 cents",
        "1e999",
        "nan",
        "inf",
    ]
    + ["0x10", "1_000", "5²", "٣", "1/0", "1/2/3", "5 in 2019", "__import__('os')", "9" * 500],
)
def test_what_is_not_one_plain_number(text):
    assert parse_number(text) is None
