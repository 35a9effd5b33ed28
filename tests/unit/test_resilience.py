"""Events, goodput accounting, the report, and who is missing in a hang: what needs no process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swax_megatron import report
from swax_megatron.callbacks.stragglers import slow_ranks
from swax_megatron.model.window import window_class
from swax_megatron.resilience.events import Events, ended_with, read_events, size
from swax_megatron.resilience.goodput import CHECKPOINT, DATA, LOST, OTHER, PRODUCTIVE, RESTART, account
from swax_megatron.resilience.watchdog import missing


def test_events_survive_half_a_line(tmp_path: Path) -> None:
    first = Events.of_next_attempt(tmp_path)
    first.write("start", processes=2)
    first.write("end", code=75)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "event": "end", "co')  # killed while writing
    before = size(tmp_path)
    second = Events.of_next_attempt(tmp_path)
    assert second.attempt == 2
    second.write("start", processes=2)
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "end", "start"]
    assert (ended_with(tmp_path), ended_with(tmp_path, before)) == (75, None)
    assert list(read_events(tmp_path / "nowhere")) == []


def told(*events: tuple[float, int, str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"time": time, "attempt": attempt, "event": event, **fields} for time, attempt, event, fields in events]


RUN = told(
    (10.0, 1, "start", {"began": 0.0}),
    (20.0, 1, "resume", {"step": 0}),
    (40.0, 1, "progress", {"step": 10, "seconds": {"data": 1.0, "compute": 15.0, "update": 3.0, "metrics": 1.0}}),
    (42.0, 1, "saved", {"step": 10, "seconds": 2.0}),
    (53.0, 1, "progress", {"step": 15, "seconds": {"checkpoint": 2.0, "data": 1.0, "compute": 10.0}}),
    (70.0, 2, "start", {"began": 65.0}),  # killed at some time after 53; steps 11 to 15 are done again
    (80.0, 2, "resume", {"step": 10}),
    (100.0, 2, "progress", {"step": 20, "seconds": {"compute": 20.0}}),
    (101.0, 2, "end", {"code": 0}),
)


def test_where_the_time_went() -> None:
    found = account(RUN)
    assert found.wall == pytest.approx(101.0)
    expected = {PRODUCTIVE: 18.0 + 20.0, DATA: 1.0, CHECKPOINT: 2.0, LOST: 11.0, RESTART: 20.0 + (80.0 - 53.0)}
    for kind, seconds in expected.items():
        assert found.seconds[kind] == pytest.approx(seconds), kind
    assert found.seconds[OTHER] == pytest.approx(101.0 - sum(expected.values()))
    assert found.fraction == pytest.approx(38.0 / 101.0)
    assert [(attempt.number, attempt.first_step, attempt.last_step, attempt.code) for attempt in found.attempts] == [
        (1, 0, 15, None),
        (2, 10, 20, 0),
    ]


def test_a_rewind_is_lost_time() -> None:
    events = told(
        (0.0, 1, "start", {"began": 0.0}),
        (1.0, 1, "resume", {"step": 0}),
        (11.0, 1, "progress", {"step": 4, "seconds": {"compute": 10.0}}),
        (17.0, 1, "progress", {"step": 7, "seconds": {"compute": 6.0}}),
        (17.0, 1, "rewind", {"step": 6, "to": 4}),
        (27.0, 1, "progress", {"step": 8, "seconds": {"compute": 10.0}}),
    )
    found = account(events)
    assert (found.seconds[PRODUCTIVE], found.seconds[LOST], found.seconds[RESTART]) == pytest.approx((20.0, 6.0, 1.0))


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in RUN))
    windows = [128.0, 2048.0]
    steps = [{"step": step, "loss/train": 5.0 - step / 10, "time/step": 1.0, "window/size": windows[step % 2]} for step in range(20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 20, "lo')
    assert report.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for part in ("20 steps, loss 3.1000; 2 start(s), 00:01:41", "goodput 37.6%", "lost", "no word (killed", "0 finished", "2048"):
        assert part in out, out
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["goodput.png", "loss.png", "report.txt", "step_time.png"]
    assert all(path.stat().st_size > 1000 for path in (tmp_path / "report").glob("*.png"))
    assert report.main([str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'nowhere'} holds no events.jsonl: give ") and error.count("\n") == 1


def beat(number: int, section: str = "compute", step: int = 4, waits: bool = True) -> dict[str, Any]:
    return {"beat": number, "section": section, "step": step, "waits": waits}


@pytest.mark.parametrize(
    ("after", "silent", "behind"),
    [
        ({0: beat(9), 1: beat(5), 2: beat(9)}, [1], []),  # its heart stands still
        ({0: beat(9), 1: beat(9)}, [2], []),  # never had one
        ({0: beat(9), 1: beat(9, waits=False), 2: beat(9)}, [], [1]),  # all in the same section, and it waits for nobody
        ({0: beat(9), 1: beat(9, "data", waits=False), 2: beat(9)}, [], [1]),
        ({0: beat(9, step=5), 1: beat(9, "update"), 2: beat(9, "data", step=5)}, [], [1]),
        ({0: beat(9), 1: beat(9), 2: beat(9)}, [], []),
    ],
)
def test_who_is_missing(after: dict[int, dict[str, Any]], silent: list[int], behind: list[int]) -> None:
    assert missing({rank: beat(5) for rank in after}, after, 3) == (silent, behind)


def test_slow_ranks() -> None:
    assert slow_ranks([(0.1, 1.0), (0.1, 1.0), (0.1, 2.1), (0.6, 1.0)], 1.3, [0] * 4) == ([2, 3], pytest.approx(2.0))
    assert slow_ranks([(0.0, 1.0), (0.0, 2.0)], 1.3, [0, 0]) == ([1], pytest.approx(2.0))
    assert slow_ranks([(0.0, 1.0), (0.0, 1.1)], 1.3, [0, 0])[0] == []
    # the last stage has the head: no rank of it is slow beside the others of its stage
    assert slow_ranks([(0.0, 1.0), (0.0, 1.5), (0.0, 2.0), (0.0, 2.1)], 1.3, [0, 0, 1, 1]) == ([1], pytest.approx(1.5))


def test_window_classes() -> None:
    assert [window_class(w) for w in ((128, 128), (2048,), (128, 2048), (128, 2048, 2048))] == ["128", "2048", "~1024", "~1448"]
