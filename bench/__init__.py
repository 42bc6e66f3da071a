"""Every figure of the documentation has its script here."""
