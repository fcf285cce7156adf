"""An image server over bundles: HTTP in the shape of OpenAI's images API. docs/serving.md is its manual."""
