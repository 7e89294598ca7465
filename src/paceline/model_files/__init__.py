"""What the files of a model's folder say about its tokenizer and about where sequences end.

The router reads them to tokenize, the engine to know the end tokens, so both get the same answer.
Every key is used, is known to change no token, or is refused by name. Imports no torch.
"""
