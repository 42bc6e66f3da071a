"""Training: ``augment`` (crops), ``losses``, ``loop`` (resumable steps), ``supervised`` (the source model),
``selftraining`` (the student of a round).  ``python -m adapt.train`` trains a pack."""
