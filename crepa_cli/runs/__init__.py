"""Runs on disk: the folder of a run, and the checks of its settings against a checkpoint."""
