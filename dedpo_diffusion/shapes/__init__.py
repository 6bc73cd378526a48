"""The embedded world: prompts, renderer, true preference and simulated human of "Shapes"."""
