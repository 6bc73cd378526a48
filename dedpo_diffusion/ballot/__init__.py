"""People label image pairs in a web page: `dedpo vote`.

| file | what it is |
|---|---|
| plan.py | which pair comes when, on which side, with what probability: pure functions of the seed |
| poll.py | where the voting stands, and what each rater is asked next: a replay of events |
| store.py | the events on disk, appended and never changed |
| booth.py | all of these for one pair dataset: tickets, images, answers |
| tally.py | events -> the vote file, the label file, and what they are worth |
| server.py | HTTP around the booth, and what it refuses |
| page/ | the page itself |
"""
