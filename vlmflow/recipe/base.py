"""What all recipe sections share: no unknown fields, plain names, known reals."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A recipe section: unknown fields are refused, values cannot be changed later, no silent type coercion of text."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
