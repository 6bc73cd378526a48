"""What people and judges said of pairs: the files, how far they agree, calibration, warnings, what more labels would buy.

Public: files.read_labels, files.write_labels, answers.Answers, agreement.vote_summary, calibration.calibrate, judge_diagnosis.diagnose,
    clusters, warnings, plan.
May import: core, debias, settings.
"""
