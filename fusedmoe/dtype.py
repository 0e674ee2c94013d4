"""One row per dtype that the library computes in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """`name` is PyTorch's; `roundoff` is half the distance between 1 and the next number."""

    name: str
    roundoff: float


DTYPES = {
    row.name: row
    for row in (
        Dtype("float64", 2.0**-53),
        Dtype("float32", 2.0**-24),
        Dtype("float16", 2.0**-11),
        Dtype("bfloat16", 2.0**-8),
    )
}


def row(dtype: object) -> Dtype:
    """Return the row of a `torch.dtype`. Raises: TypeError for a dtype that has none."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(DTYPES)}, got {name}")
    return DTYPES[name]
