"""Take requests, place them on workers, and stream their text back.

Owns the public APIs, tenants, the one queue where work waits, placement, journals and text. Clients
call it; the cluster starts it. It never touches KV, and never imports torch, Ray or a worker.
"""
