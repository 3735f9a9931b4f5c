"""Text in, text out: templates, output parsing, grammars. Knows nothing of llama.cpp or HTTP."""
