"""Labels nobody drew: class-balanced pseudo-labels (``cbst``) and edge alignment."""
