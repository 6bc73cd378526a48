"""What judges, from sample folders: scores, the comparison, the report. It never imports what trains.

Public: score, compare, comparison, report.
May import: core, judges, labels, models, pairs, sampling, settings, voting, weights.
"""
