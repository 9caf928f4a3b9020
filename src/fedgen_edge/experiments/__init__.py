"""What did we find: records, evaluation, checkpoints, diagnosis, report."""
