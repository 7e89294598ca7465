"""Stubs of the public API, generated from `proto/paceline/v1` by `make proto`.

Never edit by hand.
"""
