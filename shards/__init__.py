"""The packing tool: scan a source of labelled images, pack it into shards, verify them.

Of tidali it imports ``contract``, ``shard_bytes``, ``errors``, ``names`` and ``remote`` alone, never torch or DALI, so that it
runs on a small ingest machine.
"""
