"""Stubs of the internal API, generated from `proto/paceline/internal/v1` by `make proto`.

Never edit by hand.
"""
