"""What `dedpo validate` looks at in a pair dataset.

| file | what it is |
|---|---|
| scan.py | every pair once, in parallel: headers or whole images -> a few numbers each |
| near.py | near-duplicate images, by Hamming distance of perceptual hashes |
| findings.py | those numbers -> what there is, what is wrong, what is odd |
| answers.py | the same of labels, votes and targets |
"""
