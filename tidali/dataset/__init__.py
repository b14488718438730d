"""What a packed data set is: its files and manifest, the bytes of a shard, and opening one where it lies.

Standard library only.
"""
