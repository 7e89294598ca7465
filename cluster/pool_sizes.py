"""Sizes of pools as callers of the control API give them."""

from collections.abc import Mapping

from paceline.cluster.process_state import Role
from paceline.errors import FieldViolation, InvalidRequestError


def checked_sizes(sizes: Mapping[str, int]) -> dict[Role, int]:
    """Return the sizes by role. Raises InvalidRequestError for one that no deployment can have."""
    checked: dict[Role, int] = {}
    for pool, size in sizes.items():
        if pool not in (Role.PREFILL.value, Role.DECODE.value):
            raise InvalidRequestError(
                FieldViolation(
                    "pools", f"there is no pool {pool!r}; the pools are prefill and decode"
                )
            )
        if size < 0:
            raise InvalidRequestError(
                FieldViolation(f"pools[{pool}]", f"is {size}; a pool has 0 workers at least")
            )
        checked[Role(pool)] = size
    if checked.get(Role.DECODE) == 0:
        raise InvalidRequestError(
            FieldViolation(
                "pools[decode]",
                "is 0, and nobody could stream tokens; it must be at least 1. To end the "
                "deployment: paceline down",
            )
        )
    return checked
