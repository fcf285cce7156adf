"""The command line: one file for each verb, one table of verbs, and one place that turns errors into exit codes (`main`)."""
