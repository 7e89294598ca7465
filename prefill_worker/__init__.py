"""Compute the KV cache of prompts in chunks, and each prompt's first token.

Owns chunked-prefill scheduling (`scheduler`, pure; its answers are in `outcomes`) and the export of
KV blocks as they are computed. The cluster starts it, the router feeds it. It never queues work
that it cannot start, and never imports the decode worker or the router.
"""
