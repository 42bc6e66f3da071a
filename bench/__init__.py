"""Every figure of the documentation has its script here."""

from common.launch import watch

watch()
