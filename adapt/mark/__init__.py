"""A page on the loopback on which a person marks frames: `python -m adapt.mark`."""
