"""The ground floor: what every room stands on and nothing of the method.

Public: console.stage, console.UserError, console.Progress, files.atomic_file, tables, records, prefetch.prefetch, locks.share_tasks,
    engine.open_engine, stopping.StopSignal, page.document, charts.
May import: nothing of this project.
"""
