"""The kinds of values in eectl's files, as pydantic checks them: finite numbers, counts, and texts of bearable length."""

from typing import Annotated

from pydantic import Field, StringConstraints

Text = Annotated[str, StringConstraints(max_length=10_000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Natural = Annotated[int, Field(ge=1, lt=2**63)]
FEW = Field(max_length=10_000)  # entries of a list that is looked through one by one
