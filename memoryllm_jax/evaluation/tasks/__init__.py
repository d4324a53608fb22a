"""Task files of the harness (lm_eval) for data on a disk."""
