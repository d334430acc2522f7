import pytest

from distributed_mi.serving.text import add_row, clean, table, to_text


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain", "plain"),
        (None, ""),
        ("two\nlines\tand  spaces", "two lines and spaces"),
        ("\x1b[31mred\x1b[0m", "[31mred [0m"),
        ("left \u202egnp.exe", "left gnp.exe"),
        ("Über-Größe 東京", "Über-Größe 東京"),
        ("\ud800broken", "broken"),
    ],
)
def test_clean_leaves_one_printable_line(raw: str | None, shown: str) -> None:
    assert clean(raw) == shown


def test_clean_cuts_at_the_limit() -> None:
    assert clean("x" * 20, 10) == "x" * 9 + "…"
    assert clean("x" * 10, 10) == "x" * 10


def test_markup_and_emoji_codes_are_literal() -> None:
    made = table("title", "score", numbers=("score",))
    add_row(made, "[red]not red[/red] [link=x] :smile:", "1.0")
    text = to_text("[bold]literal[/bold]", made)
    assert "[bold]literal[/bold]" in text
    assert "[red]not red[/red] [link=x] :smile:" in text
    assert "\x1b" not in text
