"""Move KV blocks between pools by leased reads.

Owns leases, the read protocol, the KV layout and the transports. The worker calls it, and joins it
to the engine. It never writes another worker's memory, never knows what K or V mean, and never
imports the engine.
"""
