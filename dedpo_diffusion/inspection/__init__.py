"""What `dedpo validate` looks at in a pair dataset.

| file | what it is |
|---|---|
| scan.py | every pair once, in parallel: headers or whole images -> a few numbers each |
| near.py | near-duplicate images, by Hamming distance of perceptual hashes |
| findings.py | those numbers, labels, votes and targets -> what there is, what is wrong, what is odd |
"""
