"""Labels of one's own: rounds of self-training on the frames of the road, and what they need."""

from networks.launch import watch

watch()
