"""A page that draws with a bundle, for one team in one browser each. Gradio is imported when the page is made."""
