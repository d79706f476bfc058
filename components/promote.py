"""Component `promote`: a candidate that passes its gates becomes the champion of its registered model."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def promote(model: str, candidate: str, promoted: Output[Artifact], page: Output[HTML], metrics: Output[Metrics]):
    """Promote a candidate through the gates; repeating it changes nothing.

    Args:
        model: Registered model NAME.
        candidate: Version of NAME-candidates; empty = the newest that passes, if it is newer than the champion.
    """
    from vlmflow import ports
    from vlmflow.registry import desk
    from vlmflow.step import frame

    with frame("promote"):
        ports.put_object(desk.promote(model, candidate), promoted, page, metrics, title=f"Promotion of {model}")
