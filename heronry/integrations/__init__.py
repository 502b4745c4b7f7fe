"""The ecosystem's own classes over our models; each file imports the package that it serves."""
