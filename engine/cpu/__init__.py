"""The engine on CPUs, and the reference of the others: PyTorch operators and NumPy tables."""
