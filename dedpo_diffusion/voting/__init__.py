"""People say in a web page which image of a pair is better, of a pair dataset or of two models: `dedpo vote`.

| file | what it is |
|---|---|
| plan.py | which pair comes when, on which side, with what probability: pure functions of the seed |
| queue.py | where the voting stands, and what each rater is asked next: a replay of events |
| store.py | the events on disk, appended and never changed |
| samples.py | two models' images as pairs that do not tell which model drew which |
| service.py | all of these for one voting: tickets, images, answers |
| export.py | events -> the vote file, the label file, and what they are worth |
| sample_export.py | events on two models' images -> answers about the arm, and what may be said while people vote |
| server.py | HTTP around the service, and what it refuses |
| page/ | the page itself |
"""
