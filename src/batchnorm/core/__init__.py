"""The mathematics, once, over any array-API namespace `xp`.

Statistics are held in two shapes: as the caller sees them, the sizes of the kept axes in ascending order, and
`spread out` with size 1 on every reduced axis, so that they broadcast against x. `Axes` goes from one to the other.
"""
