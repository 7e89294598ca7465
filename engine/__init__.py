"""Run a model on one worker: from planned steps to sampled tokens.

Owns the model, its weights, the KV pool, block allocation, the prefix cache, chunk planning and
sampling. The workers call it. It never talks to another process, and never imports KV transports.
"""
