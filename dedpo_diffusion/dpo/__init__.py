"""The method on one screen: noise and timesteps, errors, implicit rewards, margin, pair loss, balance; tensors in, tensors out.

Public: step.preference_step, losses.margin, losses.preference_loss, balance.balance_errors, adadpo, noising.draw, objectives,
    adaptive_power.AdaptivePower, gradient_noise.noise_ratio, sharpness, policy_gradient.
May import: core, debias.
"""
