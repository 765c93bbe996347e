"""Routers: which experts a token meets, one file a method."""
