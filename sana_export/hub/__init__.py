"""The Hugging Face hub: settings, errors, names of repositories, and whole bundles up and down."""
