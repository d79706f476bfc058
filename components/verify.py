"""Component `verify`: the first task of a promotion: MLflow answers, and every gate's verdict on the candidate."""

from kfp import dsl
from kfp.dsl import HTML, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def verify(model: str, candidate: str, page: Output[HTML], metrics: Output[Metrics]):
    """Judge a candidate without changing anything.

    Args:
        model: Registered model NAME.
        candidate: Version of NAME-candidates; empty = the newest.
    """
    from vlmflow import ports
    from vlmflow.registry import desk
    from vlmflow.step import frame

    with frame("verify"):
        version, results = desk.verdict(model, candidate)
        rows = [{"gate": each.name, "passed": each.passed, "detail": each.detail} for each in results]
        values = {each.name: each.passed for each in results}
        ports.show(f"Gates of {model}-candidates {version}", values, page, metrics, table=rows)
