"""A benchmark's results as JSON, Markdown, HTML and plots, and the comparison of two reports."""
