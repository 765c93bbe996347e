"""The benchmark families, one module a primitive or layer, and what several of them share."""
