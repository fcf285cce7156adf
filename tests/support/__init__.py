"""What several test files use: checkpoints, bundles, stand-ins for hardware, and ways to run the command line."""
