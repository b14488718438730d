"""The packing tool: scan a source of labelled images, pack it into shards, verify them.

Imports ``tidali.contract`` and ``tidali.errors`` only, never torch or DALI, so that it runs on a small ingest machine.
"""
