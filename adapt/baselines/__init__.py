"""Small online baselines that a round of adaptation is compared with: nothing, batch statistics alone, TENT.

Each answers frames and may adapt itself to them on the way: ``method.answer(frames) -> labels``.  None is
offered to the loop: they change the network that answers, with no gate between.
"""

from adapt.baselines.online import BatchStatistics, Frozen, Method, Tent, entropy

__all__ = ["BatchStatistics", "Frozen", "Method", "Tent", "entropy"]
