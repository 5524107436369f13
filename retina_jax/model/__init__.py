"""The network (Section 4, Figure 3): pixels to class logits and box deltas of every anchor.

`retinanet.RetinaNet` is the whole: `inputs` normalises the pixels, `resnet` makes C2 to C5, `fpn` the pyramid P3 to P7,
`heads` the two subnets. `layers` holds the convolution and the norm all of them are built from, `initialisation` the
random start, `table` the count of what is trained and what is frozen.

Variables live in three collections: `params` is trained; `frozen` is never touched by gradient, decay or momentum, because
none of them ever sees it; `stats` holds the running statistics of BatchNorm where it is trained.
"""
