"""Stream the tokens after the first one, many sequences a step.

Owns continuous batching, admission and credit, the import of KV blocks, and preemption. The cluster
starts it, the router feeds it. It never queues work that it has not admitted, and never imports the
prefill worker or the router.
"""
