"""Kill and stop processes of a real deployment under load, and compare every token.

`python -m paceline.bench.faults` starts a deployment of its own on this machine and ends it. It
uses the command line and the public APIs only.
"""
