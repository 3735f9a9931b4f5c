"""The only importer of llama_cpp: thin, typed, no policy. Objects own C memory and free it in `close`."""
