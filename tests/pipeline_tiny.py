"""A pipeline of two real steps and a loop, for tests of the local runner: seconds instead of minutes."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Output, PipelineTaskFinalStatus

from components import IMAGE
from pipelines.platform import once, repeatable


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def first(text: str, note: Output[Artifact]):
    import os
    import time

    from vlmflow.step import emit

    emit(step="first", state="start")
    with open(note.path, "w") as file:
        file.write(text)
    if text == "boom":
        emit(step="first", state="failed", note="DataError: table 'a.csv' has no column 'url'", code=2)
        raise SystemExit(1)
    if text == "killed":
        os.kill(os.getpid(), 9)
    if text == "sleep":
        with open(os.environ["TEST_PID_FILE"], "w") as file:
            file.write(str(os.getpid()))
        os.rename(os.environ["TEST_PID_FILE"], os.environ["TEST_PID_FILE"] + ".ready")
        time.sleep(600)
    emit(step="first", state="end", seconds=0.5)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def last(status: PipelineTaskFinalStatus):
    import os

    with open(os.environ["TEST_RESULT"] + ".end", "w") as file:
        file.write(status.state)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def names(given: list) -> list:
    return given


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def each(note: Input[Artifact], name: str, made: Output[Artifact], missing: Input[Artifact] = None, group: dict = {}):  # noqa: B006
    assert missing is None and group == {}
    with open(note.path) as source, open(made.path, "w") as file:
        file.write(f"{source.read()} {name}")
    made.metadata["name"] = name


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def second(notes: Input[list[Artifact]], metrics: Output[Metrics]):
    import os
    from pathlib import Path

    from vlmflow.step import emit

    emit(step="second", state="start")
    emit(step="second", label="reading", done=1, total=2, unit="notes", note="", state="progress")
    found = "|".join(f"{Path(note.path).read_text()}={note.metadata['name']}" for note in notes)
    with open(os.environ["TEST_RESULT"], "w") as file:
        file.write(found)
    metrics.metadata["notes"] = len(notes)
    emit(step="second", state="end", seconds=0.25)


@dsl.pipeline(name="tiny")
def tiny(text: str = "hello", extra: str = "a"):
    """Two steps.

    Args:
        text: What is carried.
        extra: The first name of the loop.
    """
    with dsl.ExitHandler(once(last())):
        one = repeatable(first(text=text))
        listed = repeatable(names(given=[extra, "b"]))
        with dsl.ParallelFor(listed.output) as name:
            made = repeatable(each(note=one.outputs["note"], name=name))
        once(second(notes=dsl.Collected(made.outputs["made"])))
