"""From pairs and targets to a trained adapter: the sampler of pairs, their loader and cache, the set-up, curves, health, validation.

Public: setup.set_up, data.PairLoader, pair_sampler.PairSampler, cache.PairCache, metrics, health.Watch, optimizers, held_out,
    validation.Validation, sharding, sharpness, trackers, rollouts.Rollouts, rewards.Reward.
May import: core, debias, dpo, judges, labels, models, pairs, sampling, settings, weights.
"""
