"""The guarded swap: submit, verify, shadow, flip, watch, roll back."""
