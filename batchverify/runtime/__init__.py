"""What computes on this machine: devices, runtimes, and networks compiled by OpenVINO.

In: the user's options, models. Out: a device, a runtime, a compiled network. No room lies below.
"""
