"""Models, and localllm itself, on a stick: made on one machine, checked on the stick, installed without a network.

`manifest`, `ed25519`, `machine`, `verify` and `bootstrap` travel with every bundle and run there before localllm is
installed: standard library only, Python 3.8, relative imports. The others stay here: they know the library, pip and cmake.
"""
