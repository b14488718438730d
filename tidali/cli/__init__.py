"""The command line: parse the flags, call the other rooms, print."""
