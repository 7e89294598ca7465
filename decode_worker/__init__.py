"""Stream the tokens after the first one, many sequences a step.

Owns continuous batching, admission and credit, the import of KV blocks, and preemption. The cluster
starts it, the router feeds it. It never queues work that it has not admitted, and never imports the
prefill worker or the router.

Pure: `scheduler` is what others call; `admission` and `preemption` decide who may hold blocks;
`roster` moves what attempts hold, `departures` frees it; `planning` makes a step from the columns
of `batch`, `results` takes what it gave, `outbox` keeps what may leave. `core`, `intake` and
`process` are the shell around it.
"""
