"""Which block to align: the default from the configuration, or a recommendation from a measurement on clips."""
