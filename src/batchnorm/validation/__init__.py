"""What the public functions accept; runs when a kernel declines a call, before anything has changed.

Each function returns what the kernels take, or raises an error that says what is wrong, what is allowed and how to fix
it.
"""
