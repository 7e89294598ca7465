"""Start, place, watch, scale and replace every process from one YAML file.

Owns the settings tree, the controller, the Ray actors and the command line. People and their
scripts call it. It never carries a token or a KV byte.
"""
