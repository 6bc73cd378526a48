"""The whole journey as a list of steps, what each will cost, and the journal by which a stopped one goes on.

Public: steps.steps, plan.Route, journal.Journal, journal.Step, costs.
May import: core, labels, pairs, sampling, settings, shapes, weights.
"""
