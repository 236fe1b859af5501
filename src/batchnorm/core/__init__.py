"""The mathematics, written once, over any array-API namespace `xp`.

Statistics have two shapes: the caller's, the sizes of the channel axes in ascending order; and an expanded one, with
size 1 on every reduced axis, which broadcasts against x. `Axes` converts between them.
"""
