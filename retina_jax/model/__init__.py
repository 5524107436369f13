"""The network (Section 4, Figure 3): pixels to class logits and box deltas of every anchor.

Variables are in three collections: `params` is trained; `frozen` never enters gradient, decay or momentum; `stats` holds
the running statistics of trained BatchNorm.
"""
