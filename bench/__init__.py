"""Measure a running deployment, and its parts alone.

Owns the load generator, traces, reports and micro-benchmarks. People and CI call it. It never runs
while serving, and reports no number without the hardware, versions and settings behind it.
"""
