"""The device and its precision, the ranks of a distributed run, the clock, and the ``cpu_*`` modules: workarounds that only
training on a CPU needs, each with its reason, its measured gain, and when it can be deleted."""
