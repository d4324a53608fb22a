"""Analyses of a trained model's feed-forward layers as token-key-value and key-value memories."""
