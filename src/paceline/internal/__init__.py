"""Protocols between paceline's own processes: no promise of compatibility between versions."""
