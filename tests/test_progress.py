"""What a log, which is no terminal, is told of a long loop."""

from diffmoe import progress


def test_a_log_gets_plain_lines_now_and_then(monkeypatch, capsys):
    now = iter(range(0, 1000, 10))  # every item takes 10 s
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    assert list(progress.shown(range(8), "sampling", True)) == list(range(8))
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines() == [
        "sampling: 3 of 8 (38%), 1 min left",
        "sampling: 6 of 8 (75%), 0 min left",
    ]


def test_quick_loops_and_other_ranks_say_nothing(monkeypatch, capsys):
    assert list(progress.shown("abc", "sampling", True)) == ["a", "b", "c"]
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert list(progress.shown("abc", "sampling", False)) == ["a", "b", "c"]
    said = capsys.readouterr()
    assert said.out + said.err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(progress.shown([1, 2], "sampling", True)) == [1, 2]
    assert "sampling: 100%" in capsys.readouterr().err
