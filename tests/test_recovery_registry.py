"""Registration, cut off at every kind of request to MLflow: the next call gives one run, one model and one version."""

from __future__ import annotations

from itertools import groupby

import pytest
import registry_samples as samples

from vlmflow.registry import run as registry
from vlmflow.registry import tracking

WRITES = ("create_", "log_", "set_", "finalize_")


class Cut(BaseException):
    """The process ends here."""


class Client:
    """An MLflow client that remembers its writes and ends before the one of number `at`."""

    def __init__(self, client, at: int | None = None) -> None:
        self.client, self.at, self.writes = client, at, []

    def __getattr__(self, name: str):
        method = getattr(self.client, name)
        if not name.startswith(WRITES):
            return method

        def write(*args, **kwargs):
            if len(self.writes) == self.at:
                raise Cut(name)
            self.writes.append(name)
            return method(*args, **kwargs)

        return write


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return tmp_path_factory.mktemp("mlflow")


def test_cut_off_anywhere(database, tmp_path, monkeypatch):
    monkeypatch.chdir(database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}/mlflow.db")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    mlflow = tracking.client()

    def register(number: int, at: int | None = None) -> Client:
        """The model of this number; each has a name, an experiment and weights of its own in one database."""
        spec = {"model": f"m{number}", "experiment": f"e{number}"}
        (tmp_path / str(number)).mkdir(exist_ok=True)
        ctx = samples.context(tmp_path / str(number), registry=spec)
        model = registry_model(ctx, number)
        client = Client(mlflow, at)
        monkeypatch.setattr(tracking, "client", lambda: client)
        registry.run(ctx, model, samples.score_table(model), None, {"sft": samples.manifest()})
        return client

    def registry_model(ctx, number: int):
        from vlmflow.models import store

        found = store.find(ctx, "k")
        return found or samples.published(ctx, tmp_path / str(number), f"weights {number}".encode())

    def state(number: int) -> dict:
        experiment = mlflow.get_experiment_by_name(f"e{number}")
        runs = mlflow.search_runs([experiment.experiment_id])
        versions = mlflow.search_model_versions(f"name = 'm{number}-candidates'")
        logged = mlflow.search_logged_models([experiment.experiment_id])
        return {
            "runs": [(r.info.status, r.data.metrics, sorted(r.data.params), sorted(r.data.tags)) for r in runs],
            "datasets": [len(r.inputs.dataset_inputs) for r in runs],
            "versions": [(v.version, sorted(v.tags)) for v in versions],
            "models": [str(model.status) for model in logged],
        }

    writes = register(0).writes
    assert {"create_run", "log_batch", "create_logged_model", "create_model_version", "set_terminated"} <= set(writes)
    whole = state(0)
    assert [len(whole[name]) for name in ("runs", "versions", "models")] == [1, 1, 1]
    starts = [next(iter(group))[0] for _, group in groupby(enumerate(writes), key=lambda pair: pair[1])]
    for number, at in enumerate(starts, start=1):
        with pytest.raises(Cut):
            register(number, at)
        register(number)
        assert state(number) == whole, f"cut off before write {at} ({writes[at]})"
