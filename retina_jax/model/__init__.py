"""The network (Section 4, Figure 3): pixels to class logits and box deltas of every anchor.

Its variables: `params` is trained; `frozen` never enters gradient, decay or momentum; `stats` are BatchNorm's running ones.
"""
