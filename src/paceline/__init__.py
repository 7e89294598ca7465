"""Serve large language models with prefill and decode on separate workers.

This package holds the words that every process shares (errors, requests, sampling parameters, block
keys) and the generated protocol stubs (`v1`, `internal.v1`). Everything imports it; it imports no
torch, Ray or gRPC (the stubs and `grpc_server` excepted), so that a client can use it without them.
The other subpackages are folders at the repository's root, linked in here (`docs/adr/0002`).
"""

from importlib.metadata import version

__version__ = version("paceline")
