"""The packing tool: scan a source of labelled images, pack it into shards, verify them.

Of tidali it imports only ``dataset``, ``files`` and ``errors``, never torch or DALI, so that it runs on a small machine.
"""
