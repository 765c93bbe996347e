"""Expert layers, which compute the routed tokens: one file per kind."""
