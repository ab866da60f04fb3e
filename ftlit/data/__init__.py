"""From rows to packed batches: formats, templating, packing, data modules."""
