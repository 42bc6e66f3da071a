"""Training.  ``trainer`` is the loop that survives a crash; ``segmentation`` and ``edges`` give the loss of a
step; ``supervised`` trains a source model, and ``batches`` draws what a round learns from.
``python -m adapt.train`` trains a pack."""
