"""Token-wise lookups: the rows of a trained token memory in one file. docs/tol.md describes the format."""
