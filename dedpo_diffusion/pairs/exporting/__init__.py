"""Pair datasets as other programs read them; `pairs.formats` reads each of these back.

| file | what it is |
|---|---|
| rows.py | every pair with the answers that people gave, in order |
| labelstudio.py | tasks and a labelling configuration for Label Studio |
| argilla.py | a dataset folder for Argilla's client |
| tables.py | parquet for `datasets`, an image folder, a CSV |
| sharing.py | pairs for everyone: what of them nobody else needs to know is left out; the card of the data set |
| bare_images.py | image files without metadata |
"""
