"""The gate: checks that judge an adapted network without target labels, before it is exported."""
