"""The benchmark families, one module per primitive or layer, and what several of them share."""
