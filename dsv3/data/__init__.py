"""Text to batches: a batch is a pure function of (config, seed, row).

`sources` finds documents, `tokenizer` turns them into ids, `shards` keeps the
ids on disk, `packing` lays them out in rows, `mixture` interleaves sources,
`batches` adds labels. No state: a restart or another number of hosts asks for
the same rows by number and gets them.
"""
