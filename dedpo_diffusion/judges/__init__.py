"""Who says by machine which image is better: scorers, vision-language models, servers, policies; and how far people agree with them.

Public: judge.Judge, registry.load_judge, scorers.load_scorer, vlm, openai_client, self_training, question, bradley_terry, work,
    summary.summarise.
May import: core, dpo, labels, models, pairs, settings, shapes, weights.
"""
