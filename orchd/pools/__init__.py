"""Replicas of a model on devices: the workers that step them, and replacing the model while they serve."""
