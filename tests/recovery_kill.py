"""Kill a step at every one of its commits, for real, and look at what lies in the store.

Every object that vlmflow writes becomes visible by one rename (`os.replace`). So a process that ends without a word just
before its n-th rename, for n = 1, 2, ..., has died between any two writes that there are, with the debris that SIGKILL
leaves: temporary files, half-filled work folders, no `finally`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

KILLED = 9


def contents(folder: Path) -> dict[str, bytes]:
    """Objects of a store by name; temporary files are none."""
    from vlmflow import storage

    found = {info.uri: storage.read_bytes(info.uri) for info in storage.list_uris(str(folder))}
    return {str(Path(uri).relative_to(folder)): data for uri, data in found.items()}


def dies(step: Callable[[], object], at: int) -> bool:
    """Run `step` in a process that ends just before its rename number `at` (from 1); False when it had fewer."""
    pid = os.fork()
    if pid == 0:
        count = 0
        rename = os.replace

        def counted(*args: object, **kwargs: object) -> None:
            nonlocal count
            count += 1
            if count >= at:
                os._exit(KILLED)
            rename(*args, **kwargs)  # type: ignore[arg-type]

        os.replace = counted  # type: ignore[assignment]
        try:
            step()
        except BaseException as error:
            print(f"the step failed by itself: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, KILLED), "see standard error"
    return code == KILLED


def killed_everywhere(step: Callable[[], object], root: Path, scratch: Path, most: int = 200) -> int:
    """Prove that `step` may die at any commit: what it left is part of an undisturbed run, byte for byte, and running it
    again gives an undisturbed run's result and objects. Returns the number of deaths.

    `step` must give the same bytes for the same paths, so all runs use `root` and `scratch`; what lies in `root` at the
    call is there at the start of every run.
    """
    start = root.with_name(root.name + ".start")
    shutil.rmtree(start, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    shutil.copytree(root, start)

    def fresh() -> None:
        for folder in (root, scratch):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, root)

    result, whole = step(), contents(root)
    for at in range(1, most):
        fresh()
        if not dies(step, at):
            assert contents(root) == whole
            return at - 1
        for name, data in contents(root).items():
            assert whole.get(name) == data, f"killed before commit {at}: {name} is not what a whole run writes"
        assert step() == result, f"killed before commit {at}: another result"
        assert contents(root) == whole, f"killed before commit {at}: other objects"
    raise AssertionError(f"the step has more than {most} commits")
