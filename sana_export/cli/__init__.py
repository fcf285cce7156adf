"""The command line: one file a verb, one table of verbs, one place that turns errors into exit codes (`main`)."""
