"""What an image file is: its kind, its pixels and its orientation, and whether it is whole. All that opens images uses it."""
