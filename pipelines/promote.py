"""From candidate to champion by hand: the promoter's gates, asked for from the Kubeflow UI."""

from kfp import dsl

from components.promote import promote as promote_candidate
from components.verify import verify
from pipelines import parts
from pipelines.platform import once, privileged


@dsl.pipeline(name="vlmflow-promote", display_name="Promotion: a candidate through the gates")
def promote(model: str, candidate: str = ""):
    """Judge a candidate and make it the champion if it passes every gate of its recipe and of the installation.

    Args:
        model: Registered model NAME; its candidates are the versions of NAME-candidates.
        candidate: Version of NAME-candidates; empty = the newest that passes, if it is newer than the champion.
    """
    with parts.finished():
        judged = once(verify(model=model, candidate=candidate))
        privileged(promote_candidate(model=model, candidate=candidate)).after(judged)
