"""What prefill and decode workers share around the engine.

Owns a worker's threads, its gRPC servicer, KV sessions, the step loop and the outbox. Both kinds of
worker call it. It never decides which request runs next: that is their schedulers' work.
"""
