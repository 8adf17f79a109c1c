"""What is said on stderr."""

from align.notice import notice


def test_nothing_that_a_notice_quotes_can_steer_a_terminal(capsys):
    notice("refused: \x1b]0;owned\x07\x1b[2J\u202etxt\r, 日本 é 👩\u200d🔬")
    said = capsys.readouterr().err
    assert (
        said
        == "refused: [U+001B]]0;owned[U+0007][U+001B][2J[U+202E]txt[U+000D], 日本 é 👩\u200d🔬\n"
    )
