"""The engine on NVIDIA GPUs: steps launched ahead of the device, and replayed as CUDA graphs.

Everything runs on a CPU device too, in Triton's interpreter. Nothing in a step waits for the
device: what a step needs goes to it in uploads, and what it sampled comes back by a copy.
"""
