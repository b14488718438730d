"""The device, its precision and memory, the ranks, the clock, and what is done for a CPU's sake."""
