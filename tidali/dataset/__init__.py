"""Packed data sets: the files and the manifest, the bytes of a shard, and opening one from a folder or a URL.

Standard library only.
"""
