import io
import re
import sys
import time
from contextlib import redirect_stderr

import pytest

from fxcompress.report import Progress, stages

SHOW_CURSOR = "\x1b[?25h"
HIDE_CURSOR = "\x1b[?25l"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def _work(enabled: bool | None) -> dict[str, float]:
    with stages(enabled) as progress:
        progress.stage("record")
        tick = progress.stage("calibrate", total=2)
        tick()
        tick()
        return progress.seconds


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    _work(True)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"record  \d+\.\d s\ncalibrate  2/2  \d+\.\d s\n", err)


def test_a_count_without_a_total(capsys: pytest.CaptureFixture[str]) -> None:
    with stages(True) as progress:
        progress.stage("record")()
        tick = progress.stage("refine")
        tick()
        tick()
    assert re.fullmatch(r"record  \d+\.\d s\nrefine  2  \d+\.\d s\n", capsys.readouterr().err)


@pytest.mark.parametrize("enabled", [False, None])
def test_silence(enabled: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(_work(enabled)) == ["record", "calibrate"]
    assert capsys.readouterr() == ("", "")


def test_silence_on_a_terminal_if_asked(terminal: Terminal) -> None:
    with redirect_stderr(terminal):
        _work(False)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("enabled", [True, None])
def test_bars_on_a_terminal(enabled: bool | None, terminal: Terminal) -> None:
    with redirect_stderr(terminal):
        _work(enabled)
    last = _last_frame(terminal)
    assert re.search(r"record +━+ +\d+\.\d s", last)
    assert re.search(r"calibrate +━+ +2/2 +\d+\.\d s", last)
    _assert_left_clean(terminal)


def test_a_stage_that_needs_fewer_units_than_announced_is_finished(terminal: Terminal) -> None:
    with redirect_stderr(terminal), stages() as progress:
        progress.stage("calibrate", total=16)()
        progress.stage("empty", total=0)
    last = _last_frame(terminal)
    assert re.search(r"calibrate +━{40} +1/16 ", last)
    assert re.search(r"empty +━{40} +0/0 ", last)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_stays_half_drawn(error: type[BaseException], terminal: Terminal) -> None:
    with redirect_stderr(terminal), pytest.raises(error):
        _fail(error)
    last = _last_frame(terminal)
    assert "record" in last
    assert "calibrate" not in last
    _assert_left_clean(terminal)


def test_no_line_for_a_stage_that_failed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="stop"):
        _fail(ValueError)
    assert re.fullmatch(r"record  \d+\.\d s\n", capsys.readouterr().err)


def test_the_time_of_a_stage_that_failed_counts() -> None:
    started: list[Progress] = []
    with pytest.raises(ValueError, match="stop"):
        _fail(ValueError, started)
    assert list(started[0].seconds) == ["record", "calibrate"]


def test_seconds_are_summed_and_include_the_running_stage() -> None:
    with stages(False) as progress:
        progress.stage("a")
        time.sleep(0.02)
        progress.stage("b")
        first = progress.seconds["a"]
        progress.stage("a")
        time.sleep(0.02)
        running = progress.seconds["a"]
    assert 0.02 <= first < running <= progress.seconds["a"]
    assert running >= 0.04
    assert list(progress.seconds) == ["a", "b"]


def test_late_ticks_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    with stages(True) as progress:
        late = progress.stage("a", total=2)
        progress.stage("b", total=3)
        late()
    late()
    assert [line.split("  ")[1] for line in capsys.readouterr().err.splitlines()] == ["0/2", "0/3"]


def test_markup_in_a_name_is_only_text(terminal: Terminal) -> None:
    with redirect_stderr(terminal), stages() as progress:
        progress.stage("[red]x[/nope]")
    assert "[red]x[/nope]" in _last_frame(terminal)


def test_no_stderr_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert list(_work(True)) == ["record", "calibrate"]


def _fail(error: type[BaseException], started: list[Progress] | None = None) -> None:
    with stages(True) as progress:
        if started is not None:
            started.append(progress)
        progress.stage("record")
        progress.stage("calibrate", total=16)()
        raise error("stop")


def _last_frame(terminal: Terminal) -> str:
    """What the last redraw wrote, without colours: a redraw starts by erasing its lines."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    return text.split("\r\x1b[2K")[-1]


def _assert_left_clean(terminal: Terminal) -> None:
    text = terminal.getvalue()
    assert text.count(HIDE_CURSOR) == text.count(SHOW_CURSOR) == 1
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
