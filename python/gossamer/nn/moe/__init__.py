"""Mixture-of-experts layers: routings and routers, experts, the layer over both, and balance losses."""
