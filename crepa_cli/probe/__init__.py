"""Which block to align: what the configuration says, and what a measurement on clips says."""
