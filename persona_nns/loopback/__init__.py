"""A server that speaks the NDIF 0.1 protocol on loopback: what ``--backend simulate`` starts."""
