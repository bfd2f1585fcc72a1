"""Looking at the data of a config before a run."""
