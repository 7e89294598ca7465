"""Conversion of GGUF files into model folders: config.json, tokenizer, weights in engine layout.

`model_source` checks what a file says; `converted` runs `conversion` as a process of its own and
keeps the result. Everything in a file is used, is known to change nothing, or is refused by name:
docs/gguf.md.
"""
