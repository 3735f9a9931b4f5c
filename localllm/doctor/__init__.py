"""`localllm doctor`: what this machine and installation are, what is wrong with them, and how to put it right.

`report.examine` looks at everything, `offline.prove` shows that no network is needed. What is found is a
Finding, a value; showing it is cli/doctor.py's business. llama.cpp is asked in a child process.
"""
