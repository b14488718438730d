"""The training step and the loop, schedules, metrics, evaluation, the run folder and resuming."""
