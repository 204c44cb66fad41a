"""The memory of a run: its prediction, the settings that reduce it, and what fits a device."""
