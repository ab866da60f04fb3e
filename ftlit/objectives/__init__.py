"""Formulas on tensors: no model, no batch, no trainer in here."""
