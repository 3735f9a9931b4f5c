"""What a model takes and how to load it, from its header and the machine alone: no file is opened, no llama.cpp is asked.

`spec` holds the values that pass between the parts, `architecture` what a header means for llama.cpp's memory, `weights`, `cache`
and `compute` the bytes of a shape on each device.
"""
