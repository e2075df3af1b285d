import pytest

from megatron_qlrl.reward.text import _INVISIBLE, fold_width, normalize, strip_invisible


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris", "Paris"),
        ("Pa\x00r\x1bi\x7fs", "Paris"),
        ("\ufeffPa\u200br\u200d\u2060i\xads", "Paris"),
        ("\u202esiraP\u202c", "siraP"),
        ("\u2067Paris\u2069\u200f\u200e", "Paris"),
        ("a\tb\nc\r\x0bd\u2028e f\xa0g", "a\tb\nc\r\x0bd\u2028e f\xa0g"),
        ("Zürich 東京 🙂 \U000e0041", "Zürich 東京 🙂 "),
    ],
)
def test_what_cannot_be_seen_is_taken_out(text, expected):
    assert strip_invisible(text) == expected


def test_a_run_of_invisible_characters_is_one_piece_of_work():
    """A million of them took 0.8 s, one by one."""
    run = "\u200b" * 1_000_000
    assert len(_INVISIBLE.findall(f"Pa{run}ris")) == 1
    assert strip_invisible(f"Pa{run}ris") == "Paris"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("１２３％（Ａ）", "123%(A)"),
        ("ﬁve\xa0km", "five km"),
        ("𝟓 𝐏aris", "5 Paris"),
        ("Cafe\u0301", "Café"),
        ("5² x₂ ½ ⑩", "5² x₂ ½ ⑩"),
    ],
)
def test_one_form_for_each_character_that_keeps_its_value(text, expected):
    assert fold_width(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("U.S.A.", "usa"),
        ("“Paris”—city", "pariscity"),
        ("3.14 and 1,000", "3.14 and 1000"),
        ("3,14", "3 14"),
        ("-3 − 4 to −5", "-3 4 to -5"),
        (".5 -.5 no.5", ".5 -.5 no5"),
        ("1990-1995 or 1990–1995", "1990 1995 or 1990 1995"),
        ("3:2 3/2 12:30", "3 2 3 2 12 30"),
        ("C++, C#, A+ and BBB-", "c++ c# a+ and bbb-"),
        ("O'Brien-Smith's", "obriensmiths"),
        ("5% $5 €5", "5% 5 €5"),
        ("«Ça» ¿qué?", "ça qué"),
        ("STRASSE straße", "strasse strasse"),
        ("the an A", "a"),
        ("Vitamin A", "vitamin a"),
        ("a Vitamin A for the body", "vitamin a for body"),
        ("- 5", "-5"),
        ("-$5 and -(5)", "-5 and -5"),
        ("3 - 4, COVID-19", "3 4 covid19"),
        ("5 %, 5 ‰, 5\\%", "5% 5‰ 5%"),
        ("< 5 >= 5 ~5 != 5 =/= 5", "<5 >=5 ~5 !=5 =/=5"),
        ("Yahoo! and !Yahoo", "yahoo and !yahoo"),
        ("1 234 567", "1234567"),
        ("1 234", "1 234"),
        ("", ""),
    ],
)
def test_normal_form(text, expected):
    assert normalize(text) == expected
