"""What `make gpu-bundle` puts beside orchd: the way into a machine without a network, and what runs there."""
