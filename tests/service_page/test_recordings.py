"""Long scripts are made in the background: followed to the download, also by a page that was loaded anew."""

import re
import time

import pytest
from fake_studio import wav
from studio_tab import write

pytest_plugins = ["studio_fixtures"]

SCRIPT = "Speaker 1: The tide\nSpeaker 2: comes in"
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


def make(tab, script: str = SCRIPT, format: str = "wav") -> None:
    write(tab, script)
    tab.locator("#format").select_option(format)
    tab.get_by_role("button", name="Make in the background").click()
    tab.locator("#made").wait_for()


def row(tab, title: str = "The tide"):
    return tab.get_by_role("listitem").filter(has=tab.get_by_role("heading", name=title, exact=True))


@pytest.mark.parametrize("format", ["wav", "flac", "opus"])
def test_a_task_is_followed_to_its_download_through_a_reload(tab, studio, tmp_path, format):
    make(tab, format=format)
    (task,) = studio.tasks
    assert studio.bodies[task] == {"script": SCRIPT, "voices": [1, 2], "format": format, "options": {}}
    expect(row(tab)).to_contain_text("Waiting")
    expect(row(tab)).to_contain_text("Place 1 in the queue")
    studio.change(task, of_frames=750)
    studio.run(task, 300)
    expect(row(tab).locator(".detail")).to_contain_text(
        "40% · 0:40 of about 1:40 · about 20 s left · 3.0 times as fast"
    )
    tab.reload()
    expect(row(tab).locator(".detail")).to_contain_text("40%")
    assert tab.locator("#script").input_value() == SCRIPT
    studio.run(task, 600)
    expect(row(tab).get_by_role("progressbar")).to_have_attribute("value", "600")
    expect(tab).to_have_title("80% · Studio")
    studio.finish(task)
    with tab.expect_download() as download:
        row(tab).get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == f"the-tide.{format}"
    download.value.save_as(tmp_path / "audio")
    assert (tmp_path / "audio").read_bytes() == wav(b"") + studio.audio[task]
    assert re.search(r"1:40 · [A-Z]+ · 2 speakers", row(tab).inner_text())
    expect(tab).to_have_title("Studio")


def test_progress_comes_by_events_without_asking_again(tab, studio):
    make(tab)
    (task,) = studio.tasks
    expect(row(tab)).to_contain_text("Waiting")
    studio.refusals = {"GET v1/tasks": (503, "not by the list")}
    for frames in (10, 20, 30, 40):
        studio.run(task, frames)
        expect(row(tab).get_by_role("progressbar")).to_have_attribute("value", str(frames))


def test_progress_comes_without_events_too(tab, studio):
    task = studio.add({"voices": [1]}, title="The tide")["id"]
    studio.refusals = {f"GET v1/tasks/{task}/events": (503, "no events")}
    tab.reload()
    studio.run(task, 30)
    expect(row(tab).get_by_role("progressbar")).to_have_attribute("value", "30")
    studio.finish(task)
    expect(row(tab)).to_contain_text("Done")


def test_a_task_that_gave_way_keeps_its_progress(tab, studio):
    task = studio.add({"voices": [1]}, title="The tide")["id"]
    studio.run(task, 30, status="queued", position=1)
    tab.reload()
    expect(row(tab)).to_contain_text("40% made, goes on when there is room · Place 1 in the queue")
    expect(row(tab).get_by_role("progressbar")).to_have_attribute("value", "30")


def test_what_the_service_no_longer_has_leaves_the_list(tab, studio):
    tasks = [studio.add({"voices": [1]}, title=title)["id"] for title in ("Old", "New", "Lost")]
    studio.finish(tasks[0])
    tab.reload()
    expect(tab.locator(".task")).to_have_count(3)
    del studio.tasks[tasks[0]]
    expect(tab.locator(".task")).to_have_count(2)
    with studio.changed:
        del studio.tasks[tasks[2]]
    expect(tab.locator(".task h3")).to_have_text(["New"])


def test_many_tasks_are_followed_over_few_connections(tab, studio):
    for k in range(8):
        studio.run(studio.add({"voices": [1]}, title=f"Task {k}")["id"], 10)
    tab.reload()
    expect(tab.locator(".task")).to_have_count(8)
    assert sum(call.endswith("/events") for call in set(studio.calls)) <= 2
    for task in list(studio.tasks):
        studio.finish(task)
    expect(tab.locator(".task[data-status=done]")).to_have_count(8)


def test_an_answer_that_was_lost_makes_no_second_task(tab, studio):
    studio.lost_answers = 100
    write(tab, SCRIPT)
    tab.get_by_role("button", name="Make in the background").click()
    tab.get_by_text("The service does not answer").first.wait_for()
    studio.lost_answers = 0
    tab.reload()
    expect(row(tab)).to_contain_text("Waiting")
    assert len(studio.tasks) == 1 and len(studio.asked) == 1
    tab.reload()
    expect(row(tab)).to_be_visible()
    tab.get_by_role("button", name="Make in the background").click()  # the same script, asked for again
    tab.locator("#made").wait_for()
    assert len(studio.tasks) == 2


def test_a_task_that_the_list_had_first_gets_its_title(tab, studio):
    pending = {"once": "k", "title": "The tide", "body": {"script": SCRIPT, "voices": [1, 2], "format": "wav"}}
    studio.add(pending["body"], "k")
    tab.evaluate("pending => localStorage.setItem('studio.pending', JSON.stringify(pending))", pending)
    tab.route("**/v1/tasks", lambda route: (time.sleep(0.5), route.continue_()))  # not the list: it has ?limit
    tab.reload()
    expect(row(tab)).to_be_visible()
    expect(tab.locator(".task")).to_have_count(1)


def test_a_refused_task_is_not_asked_for_again(tab, studio):
    studio.refusals = {"POST v1/tasks": (429, "You have 5 open tasks; wait for one to end.")}
    write(tab, SCRIPT)
    tab.get_by_role("button", name="Make in the background").click()
    tab.get_by_text("You have 5 open tasks").wait_for()
    tab.reload()
    tab.locator("#no-tasks").wait_for()
    assert studio.calls.count("POST v1/tasks") == 1


def test_a_task_is_cancelled(tab, studio):
    make(tab)
    row(tab).get_by_role("button", name="Cancel").click()
    expect(row(tab)).to_contain_text("Cancelled")
    expect(row(tab).get_by_role("button")).to_have_count(0)
    assert next(iter(studio.tasks.values()))["status"] == "cancelled"


def test_why_a_task_failed_is_said(tab, studio):
    make(tab)
    (task,) = studio.tasks
    studio.change(task, status="failed", error="The disk is full.")
    expect(row(tab).get_by_role("alert")).to_have_text("The disk is full.")


def test_a_finished_recording_is_played(tab, studio):
    make(tab)
    (task,) = studio.tasks
    studio.finish(task)
    row(tab).get_by_role("button", name="Play").click()
    tab.wait_for_function("() => document.querySelector('audio')?.currentTime > 0.2")
    assert tab.evaluate("document.querySelector('audio').duration") == pytest.approx(10, abs=0.1)


def test_the_newest_recording_is_first_and_waiting_ones_say_when(tab, studio):
    for k, day in enumerate((3, 1, 2), 1):
        studio.add({}, title=f"Day {day}", created=f"2026-01-0{day}T10:00:00Z", position=k, estimated_start=None)
    studio.change("task2", estimated_start="2099-01-01T00:00:00Z")
    tab.reload()
    expect(tab.locator(".task h3")).to_have_text(["Day 3", "Day 2", "Day 1"])
    expect(row(tab, "Day 1")).to_contain_text("Place 2 in the queue · starts in about")


def test_a_service_that_is_away_is_said_and_found_again(tab, studio):
    studio.refusals = {"GET v1/tasks": (503, "Redis is away."), "GET v1/voices": (503, "Redis is away.")}
    tab.reload()
    tab.get_by_text("No list of recordings. Redis is away.").wait_for()
    tab.get_by_text("No list of voices. Redis is away.").wait_for()
    studio.refusals = {}
    tab.locator("#tasks-again").click()
    tab.locator("#voices-again").click()
    expect(tab.locator("#no-tasks")).to_be_visible()
    expect(tab.locator("#voice-1")).to_be_enabled()
