"""Every figure of the documentation has its script here."""

from networks.launch import watch

watch()
