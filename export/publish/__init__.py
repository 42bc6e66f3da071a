"""From a built engine to a version directory in a repository."""
