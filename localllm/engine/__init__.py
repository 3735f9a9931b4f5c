"""One loaded model serving many sequences."""
