"""What a round did, as one HTML file a person can read anywhere: no network, no script, nothing beside it.

``figures``: SVG and pictures from numbers; ``page``: the frame all reports share; ``round``: the report of a
round.  ``python -m adapt.report ROUND_DIR`` writes one; ``adapt.run`` does at the end of each round.  Reports
hold frames of the road: they stay on the machine unless somebody takes them off it.
"""
