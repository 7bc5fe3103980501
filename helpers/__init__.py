"""The code of the series: one module per notebook, made from it by helpers.export."""
