"""What computes here: devices, number types, and networks compiled by OpenVINO.

In: what the user asked for, models. Out: a device, a runtime, a compiled network. No room lies below.
"""
