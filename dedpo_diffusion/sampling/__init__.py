"""Images from models, paired by seed, that say how they were made; the prompt sets, with their licences.

Public: sampler.sample_folder, trajectories, png, prompts.read_prompts.
May import: core, dpo, models, pairs, weights.
"""
