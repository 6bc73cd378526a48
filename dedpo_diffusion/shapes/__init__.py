"""The embedded world: prompts, renderer, true preference and simulated human of "Shapes", and the small Stable Diffusion trained on it.

Public: world.render, oracle, people, pretrain.
May import: core, labels, pairs, weights.
"""
