"""Expert layers: what a routed token is sent through, one file per kind."""
