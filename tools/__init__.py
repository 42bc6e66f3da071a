"""Developers' tools.  Nothing that serves, exports or adapts imports from here."""
