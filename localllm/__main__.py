"""`python -m localllm`, the same as the `localllm` command."""

from __future__ import annotations

from localllm.cli.app import main

if __name__ == "__main__":
    main()
