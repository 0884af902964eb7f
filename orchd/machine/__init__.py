"""Devices and memory of the machine, and what is known of them."""
