"""Experiments on a server: what is sent, how it is waited for, and what comes back."""
