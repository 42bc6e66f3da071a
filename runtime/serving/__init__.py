"""From a request to an answer: scheduler, slots, frame groups, memory budget."""
