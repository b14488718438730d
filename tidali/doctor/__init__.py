"""What this machine can do: the checks and their findings."""
