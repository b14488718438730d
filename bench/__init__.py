"""The benchmark suite: how fast this machine is, what holds it back, and how tidali compares."""
