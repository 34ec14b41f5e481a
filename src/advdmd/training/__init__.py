"""The training loop: learners, checkpoints, processes, records."""
