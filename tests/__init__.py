"""Tests of lightning_quant; the folders mirror the rooms of the package."""
