"""Fetching files from the Hub: in parallel ranges, resumable after anything, verified before they get their names.

`queue` holds the downloads of models, `transfer` fetches one file; below them `source` (one file of the Hub in ranges), `connection`
(HTTP), `parts` and `spans` (who fetches what), `partial` (what is on disk meanwhile), `digest` (the hash that follows), `rate`.
"""
