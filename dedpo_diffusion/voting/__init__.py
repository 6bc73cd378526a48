"""People say in a web page which image of a pair is better: order and sides, the queue, durable votes, the server, the label file.

Public: plan.Plan, queue.VoteQueue, store.Store, service.VoteService, rankings.RankService, export.export, opening.open_pairs,
    samples.SamplePairs, server.create_app.
May import: core, labels, pairs, settings.
"""
